"""What a model is run on: a prompt, and the layers and positions whose states are saved or loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from nodelens.messages import check_names


@dataclass(frozen=True, eq=False)
class RepresentationContext:
    """A prompt with layers and positions, for ``ModelWrapper.run``.

    prompt:     a text, a list of texts, or a soft prompt: embeddings (tokens, width) or (prompts, tokens, width)
    model_name: the name of the model, for the reader
    position:   tokens of the prompt: an index, a list, an expression such as ``n//2:`` or ``all``, a phrase, or
                ``regex:<pattern>``
    layer:      blocks, as an index, a list or an expression such as ``all`` or ``n//3:``

    >>> context = RepresentationContext("The quick brown fox", position="quick brown", layer="n//2:")
    >>> context.clone_with_overrides(layer=-1).layer
    [-1]
    """

    prompt: str | Sequence[str] | Tensor
    model_name: str = ""
    position: int | Sequence[int] | str = (-1,)
    layer: int | Sequence[int] | str = "all"

    def __post_init__(self) -> None:
        for name in ("position", "layer"):
            value = getattr(self, name)
            if not isinstance(value, str):
                object.__setattr__(self, name, [value] if isinstance(value, int) else list(value))

    def clone_with_overrides(self, **overrides: Any) -> "RepresentationContext":
        """A copy with other values of some fields. Raises TypeError for a name that is no field."""
        check_names("nl.RepresentationContext.clone_with_overrides", overrides, [field.name for field in fields(self)])
        return replace(self, **overrides)
