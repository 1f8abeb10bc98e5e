"""Positions of tokens that are padded on the left, for models that count positions from the first column."""

import contextlib
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

# methods of models that derive positions from the tokens themselves, with padding (RoBERTa) or images (Qwen-VL)
_OWN_POSITIONS = ("create_position_ids_from_input_ids", "get_rope_index")


class Positions:
    """Makes ``position_ids`` from ``attention_mask`` where padding on the left needs them, with a warning the first time.

    A model with absolute positions, such as GPT-2, counts padding on the left as tokens unless it is told the positions, and
    transformers make them only in ``generate``. They are made here in the same way. Right padding needs none.
    """

    def __init__(self) -> None:
        self.told = False  # Python's own record of warnings does not outlive a change of filters

    @classmethod
    def of(cls, model: nn.Module) -> "Positions | None":
        """None for a model that takes no positions, for encoder-decoders, and for models that derive them from the tokens."""
        with contextlib.suppress(ValueError):  # a traced module has no signature
            if "position_ids" in inspect.signature(model.forward).parameters and _counts_columns(model):
                return cls()
        return None

    def added(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the model, with positions if they are needed and not given."""
        mask = kwargs.get("attention_mask")
        given = any(kwargs.get(name) is not None for name in ("position_ids", "past_key_values"))
        if given or not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask[:, :1].all()):
            return kwargs
        if not self.told:
            warnings.warn(
                "batches are padded on the left and have no position_ids: they are made from attention_mask, as in generate of "
                "transformers; give position_ids to choose others",
                stacklevel=2,
            )
        self.told, real = True, mask.bool()
        return kwargs | {"position_ids": (real.long().cumsum(1) - 1).where(real, 0)}


def _counts_columns(model: nn.Module) -> bool:
    """Whether a model that is given no positions counts them from the first column."""
    own = any(hasattr(module, name) for module in model.modules() for name in _OWN_POSITIONS)
    return not own and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def warn_of_masks(kwargs: Mapping[str, Any], tokens: Tensor) -> None:
    """Warns of an entry that may be a mask of padding under another name, because no token is left out for it.

    Which entry of a batch marks padding, and whether by 0 or by 1, cannot be known from its name.
    """
    shape = tokens.shape[:2]
    found = [k for k, v in kwargs.items() if "mask" in k and isinstance(v, Tensor) and v.shape == shape and v is not tokens]
    if len(shape) == 2 and found:
        warnings.warn(
            f"no attention_mask was found, so every token counts as a row; {found[0]!r} is only passed to the model. If it marks "
            "padding, also give token_mask (samples, tokens), which is 1 for real tokens and is not passed to the model",
            stacklevel=2,
        )
