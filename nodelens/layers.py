"""Layers: the modules whose outputs have units, found by name."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from .geometry import Geometry
from .rows import Rows

PORTS = ("input", "output", "output*grad")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CHANNELS_SECOND = (
    *_CONVOLUTIONS,
    *_TRANSPOSED,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


@dataclass(frozen=True, eq=False)
class Layer:
    """A module whose output has units; a site is one of its ports: ``input``, ``output`` or ``output*grad``."""

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor | None:
        """(units, fan_in), detached; None where no unit has weights of its own (a ReLU, a norm, a block)."""
        weight: Any = getattr(self.module, "weight", None)
        if isinstance(self.module, nn.Linear):
            return weight.detach()
        if isinstance(self.module, _CONVOLUTIONS):
            return weight.detach().flatten(1)
        if isinstance(self.module, _TRANSPOSED):  # stored (in, out / groups, kernel)
            by_group = weight.detach().unflatten(0, (self.module.groups, -1)).transpose(1, 2)
            return by_group.flatten(0, 1).flatten(1)
        if _is_hf_conv1d(self.module):  # GPT-2 stores the transpose
            return weight.detach().T
        return None

    @property
    def geometry(self) -> Geometry | None:
        """How a convolution reads its input; None for anything else."""
        return Geometry.of(self.module) if isinstance(self.module, (*_CONVOLUTIONS, *_TRANSPOSED)) else None

    def rows(self, tensor: Tensor, samples: int) -> Rows:
        """A tensor of one of the ports as rows, without a copy.

        Units lie on axis 1 of convolutions, their norms and of any map of four or five axes, else on the last.
        Raises ValueError where the first axis is no multiple of the samples.
        """
        if tensor.ndim < 2:
            raise ValueError(f"layer {self.name!r} shows a tensor of shape {tuple(tensor.shape)}: units need two axes at least")
        if len(tensor) % samples:
            raise ValueError(
                f"layer {self.name!r} shows {len(tensor)} rows of shape {tuple(tensor.shape[1:])} for a batch "
                f"of {samples} samples: rows must belong to samples"
            )
        x = tensor if tensor.is_floating_point() and tensor.itemsize >= 4 else tensor.float()
        if self.channels_second(tensor):
            maps = x.flatten(2) if x.ndim > 2 else x[:, :, None]
            if len(x) == samples:
                return Rows(maps, grid=tuple(x.shape[2:]))
            x = maps.transpose(1, 2)  # windows or frames folded into the batch: more positions of their sample
        return Rows(x.reshape(samples, -1, x.shape[-1]).transpose(1, 2), grid=tuple(x.shape[1:-1]))

    def channels_second(self, tensor: Tensor) -> bool:
        """Whether units lie on axis 1. The module's type decides where it can, then the number of axes."""
        if isinstance(self.module, _CHANNELS_SECOND):
            return True
        return tensor.ndim >= 4 and not isinstance(self.module, (nn.Linear, nn.LayerNorm)) and not _is_hf_conv1d(self.module)


def find_layers(model: nn.Module, patterns: str | Sequence[str] = "*") -> list[Layer]:
    """The layers of a model that match a name, a glob, or a list of them, in the model's own order.

    ``"*"`` means every layer with weights (Linear, convolutions); a name or any other glob finds any module. A model that
    is itself a layer goes by its class's name. Raises ValueError for a pattern without a match.
    """
    modules = {name or type(model).__name__: module for name, module in model.named_modules()}
    layers = {name: Layer(name, module) for name, module in modules.items()}
    weighted = [name for name, layer in layers.items() if layer.weight is not None]
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        names = weighted if pattern == "*" else [name for name in layers if fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(_no_match(pattern, list(layers), weighted))
        chosen.update(names)
    return [layer for name, layer in layers.items() if name in chosen]


def _no_match(pattern: str, names: list[str], weighted: list[str]) -> str:
    near = difflib.get_close_matches(pattern.strip("*"), names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    shown = ", ".join(weighted[:12]) + (f" and {len(weighted) - 12} more" if len(weighted) > 12 else "")
    return f"no layer matches {pattern!r}{hint} the model has: {shown or 'no layer with weights'}"


def _is_hf_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
