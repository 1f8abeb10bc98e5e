"""A causal language model that runs on the token ids of prompts."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.engine.driver import device_of
from nodelens.messages import option
from nodelens.network.arguments import check_arguments
from nodelens.network.eval_mode import eval_mode, uncompiled
from nodelens.network.expressions import parse_index
from nodelens.network.hooks import Capture, Site
from nodelens.network.layers import Layer
from nodelens.network.outputs import answer_of
from nodelens.network.roles import Roles, roles_of


class TokenModel:
    """Runs a causal language model on token ids (B, T) without padding.

    The model is used as it is, in evaluation mode inside ``running``.
    """

    def __init__(self, model: nn.Module):
        self.model = uncompiled(model)
        self.name = type(self.model).__name__
        self.roles: Roles = roles_of(self.model)
        parameters = inspect.signature(self.model.forward).parameters
        self._by_name = "input_ids" in parameters
        self._options: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
        self.keeps_last = "logits_to_keep" in parameters
        self._last: dict[str, Any] = {"logits_to_keep": 1} if self.keeps_last else {}
        self.compared: set[tuple[Any, ...]] = set()  # ways of sharing passes that gave the logits of the whole model

    @classmethod
    def checked(cls, call: str, model: Any) -> "TokenModel":
        """For a public call. Raises TypeError for what is no model, ValueError for one in training mode or on the meta device."""
        check_arguments(call, model, [])
        training = next((name for name, module in model.named_modules() if module.training), None)
        if training is not None:
            where = f"module {training!r} of {type(model).__name__}" if training else type(model).__name__
            raise ValueError(f"{call}: {where} is in training mode, where dropout changes the states: call model.eval() first")
        return cls(model)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the model is in evaluation mode and records no gradients; afterwards it is as it was."""
        with torch.inference_mode(False), eval_mode(self.model), torch.no_grad():
            yield

    def logits(self, ids: Tensor, last: bool = False, cache: Any = None) -> Tensor:
        """The model's logits (B, T, V); with ``last`` those of the last position, (B, V). cache: of the tokens before these."""
        options = self._options | (self._last if last else {})
        logits = self._checked(ids, self._run(ids, options if cache is None else options | _cached(cache)))
        return logits[:, -1] if last else logits

    def _checked(self, ids: Tensor, output: Any) -> Tensor:
        """The logits (B, T, V) of an output."""
        logits = answer_of(output, None, self.name)
        if logits.ndim != 3:
            raise ValueError(
                f"{self.name} puts out {tuple(logits.shape)} for token ids {tuple(ids.shape)}: a lens needs logits (B, T, V) of a "
                "causal language model"
            )
        return logits

    @property
    def embeddings(self) -> nn.Embedding:
        """The embedding of tokens. Raises ValueError for a model that takes no embeddings in place of ids."""
        found = getattr(self.model, "get_input_embeddings", lambda: None)()
        if not isinstance(found, nn.Embedding) or "inputs_embeds" not in inspect.signature(self.model.forward).parameters:
            raise ValueError(
                f"{self.name} takes no inputs_embeds: a soft prompt needs a model that does, as language models of transformers do"
            )
        return found

    def logits_of(self, embedded: Tensor, last: int) -> Tensor:
        """The logits (B, T, V) of embeddings (B, T, d); at least those of the last positions."""
        options = self._options | ({"logits_to_keep": last} if self.keeps_last else {})
        return answer_of(self.model(inputs_embeds=embedded, **options), None, self.name)

    def cache(self, ids: Tensor) -> Any:
        """The model's key-value cache after token ids (B, T). Raises AttributeError for a model that makes none."""
        return self._run(ids, {"use_cache": True} | self._last).past_key_values

    def check_tokens(self, ids: Tensor) -> None:
        """Raises ValueError for ids that are not in the vocabulary."""
        table = getattr(self.model, "get_input_embeddings", lambda: None)()
        size = table.num_embeddings if isinstance(table, nn.Embedding) else None
        outside = ids[(ids < 0) | (ids >= size)] if size is not None else ids[:0]
        if outside.numel():
            raise ValueError(
                f"token id {int(outside.flatten()[0])} is not in the vocabulary of {self.name}, 0 to {size - 1}: give ids of this "  # type: ignore[operator]
                "model, and texts with its own tokenizer"
            )

    def _run(self, ids: Tensor, options: Mapping[str, Any]) -> Any:
        self.check_tokens(ids)
        ids = ids.to(device_of(self.model))
        return self.model(input_ids=ids, **options) if self._by_name else self.model(ids, **options)

    def read(self, ids: Tensor, layers: Iterable[Layer], last: bool = False) -> tuple[dict[str, Tensor], Tensor]:
        """{layer: what passes there, (B, T, width)} and the logits.

        Raises ValueError for a layer that never runs or that does not show one row per token.
        """
        with self._shown(ids, layers) as shown:
            logits = self.logits(ids, last)
        return shown, logits

    def read_and_cache(self, ids: Tensor, layers: Iterable[Layer]) -> tuple[dict[str, Tensor], Tensor, Any]:
        """As ``read``, with the logits of the last position, (B, V), and the key-value cache; None for a model that makes none."""
        with self._shown(ids, layers) as shown:
            output = self._run(ids, self._last | ({"use_cache": True} if self._options else {}))
        return shown, self._checked(ids, output)[:, -1], getattr(output, "past_key_values", None)

    @contextmanager
    def _shown(self, ids: Tensor, layers: Iterable[Layer]) -> Iterator[dict[str, Tensor]]:
        """Inside, what passes at the layers is kept by their names."""
        shown: dict[str, Tensor] = {}
        sites = [Site(layer, layer.side) for layer in layers]

        def keep(site: Site, tensor: Tensor) -> None:
            shown[site.layer.name] = by_token(site.layer, tensor, ids)

        with Capture(sites, keep) as capture:
            capture.gate = True
            yield shown
        silent = next((site.layer.name for site in sites if site.layer.name not in shown), None)
        if silent is not None:
            raise ValueError(f"{silent!r} never runs in {self.name}: choose other {option('layers')}")

    def blocks(self, layers: str | int | Sequence[int] = "all") -> list[int]:
        """Indices of the chosen blocks. Raises ValueError for an expression or index out of range, and a model without blocks."""
        if not self.roles.blocks:
            raise ValueError(f"{self.name} has no blocks: {self.roles.reason}; a lens needs a transformer")
        if not isinstance(layers, (str, int, Sequence)):
            raise ValueError(f"{option('layers')} is {layers!r}; it takes all, an index, a list of indices, or an expression")
        items = [layers] if isinstance(layers, (str, int)) else list(layers)
        try:
            found = {k for item in items for k in parse_index(str(item), len(self.roles.blocks))}
            if not found:
                raise ValueError("it selects no block")
        except ValueError as error:
            raise ValueError(
                f"{option('layers')}={layers!r} of {self.name} with {len(self.roles.blocks)} blocks: {error}"
            ) from None
        return sorted(found)

    def part(self, block: int, part: str) -> Layer:
        """The layer of a part of a block. Raises ValueError, with the reason, where there is none."""
        return self.roles.layers(f"blocks[{block}].{part}")[0]

    def stream(self, blocks: Iterable[int], side: str = "output") -> Mapping[int, Layer]:
        """The residual stream after (``output``) or before (``input``) each block."""
        return {k: self.part(k, side) for k in blocks}


def _cached(cache: Any) -> dict[str, Any]:
    return {"past_key_values": cache, "use_cache": True}


def by_token(layer: Layer, tensor: Tensor, ids: Tensor) -> Tensor:
    """A copy of what a layer shows, as (B, T, width). Raises ValueError if it does not have one row per token."""
    if tensor.shape[:2] == ids.shape and tensor.ndim == 3:
        return tensor.clone()
    if tensor.ndim == 2 and len(tensor) == ids.numel():  # OPT's FFN reads (B T, width)
        return tensor.reshape(*ids.shape, -1).clone()
    raise ValueError(
        f"{layer.name} shows {tuple(tensor.shape)} for token ids {tuple(ids.shape)}: a lens or patch needs one row per token"
    )
