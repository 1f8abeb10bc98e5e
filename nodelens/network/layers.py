"""Layers: the modules whose outputs have units, found by name."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.statistics.convolution import ConvolutionGeometry
from nodelens.statistics.rows import Rows

from .sharded import class_name, full

ASSOCIATION = "association"  # the port of derivatives of, and with respect to, a layer's output
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
    """A module whose output has units, or, with ``side`` input, whose input has: hidden channels before the layer that reads them.

    ``start`` is the weight before training, where it is known, as the module stores it.
    """

    name: str
    module: nn.Module
    side: str = "output"
    start: Tensor | None = None

    @property
    def title(self) -> str:
        """The name in tables."""
        return self.name

    @property
    def tensor(self) -> Tensor | None:
        """The weight as it is stored, detached; None where no unit has weights of its own (a ReLU, a norm, a block).

        Collective for a sharded model, whose weight is gathered.
        """
        return None if self.stored is None else full(self.stored.detach())

    @property
    def shape(self) -> torch.Size | None:
        """The shape of ``weight``, (units, fan_in), which no process has to gather."""
        return None if self.stored is None else self._by_unit(torch.empty(self.stored.shape, device="meta")).shape

    @property
    def stored(self) -> Tensor | None:
        """The ``tensor`` as the module holds it: of a sharded model, the part of this process."""
        weighs = isinstance(self.module, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)) or _is_hf_conv1d(self.module)
        weight: Any = self.module.weight if weighs and self.side == "output" else None
        return weight

    @property
    def weight(self) -> Tensor | None:
        """(units, fan_in), detached; None where there is no ``tensor``."""
        tensor = self.tensor
        return None if tensor is None else self._by_unit(tensor)

    @property
    def change(self) -> Tensor | None:
        """The weight less that at the start, (units, fan_in); None where either is not known."""
        tensor = None if self.start is None else self.tensor
        return None if tensor is None or self.start is None else self._by_unit(tensor - self.start.to(tensor))

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the module would put out with another weight, as stored, and no bias. Hooks of the module are not called."""
        bias = getattr(self.module, "bias", None)
        other = {"module.weight": weight} | ({} if bias is None else {"module.bias": torch.zeros_like(bias)})
        return torch.func.functional_call(_WithoutHooks(self.module), other, (x,))

    def patches(self, x: Tensor) -> Tensor:
        """What the units read, row by row, (rows, groups x fan_in): costly, for what sums over samples cannot tell.

        Raises ValueError for a transposed convolution, which reads no patches.
        """
        if isinstance(self.module, _TRANSPOSED):
            raise ValueError(f"layer {self.name!r} is a transposed convolution: its units read no patches")
        if not isinstance(self.module, _CONVOLUTIONS):
            return x.reshape(-1, x.shape[-1])
        conv: Any = self.module
        channels, kernel = conv.in_channels, conv.kernel_size
        options = {k: getattr(conv, k) for k in ("stride", "padding", "dilation", "padding_mode")}
        every = math.prod(kernel)
        reader = type(conv)(channels, channels * every, kernel, groups=channels, bias=False, device="meta", **options)
        each = torch.eye(every, dtype=x.dtype, device=x.device).reshape(every, 1, *kernel).repeat(channels, 1, *[1] * len(kernel))
        return Layer(self.name, reader).apply(x, each).flatten(2).transpose(1, 2).flatten(0, 1)

    def _by_unit(self, weight: Tensor) -> Tensor:
        if isinstance(self.module, _TRANSPOSED):  # stored (in, out / groups, kernel)
            by_group = weight.unflatten(0, (self.module.groups, -1)).transpose(1, 2)
            return by_group.flatten(0, 1).flatten(1)
        return weight.T if _is_hf_conv1d(self.module) else weight.flatten(1)  # GPT-2 stores the transpose

    @property
    def geometry(self) -> ConvolutionGeometry | None:
        """How a convolution reads its input; None for anything else."""
        return ConvolutionGeometry.of(self.module) if isinstance(self.module, (*_CONVOLUTIONS, *_TRANSPOSED)) else None

    def rows(self, tensor: Any, samples: int, mask: Tensor | None = None) -> Rows:
        """A tensor of one of the ports as rows, without a copy; kept are those that a mask (samples, positions) marks.

        Units lie on axis 1 of convolutions, their norms and of any map of four or five axes, else on the last. A mask of another
        number of positions marks nothing here. Raises ValueError where the first axis is no multiple of the samples.
        """
        rows = self._laid_out(tensor, samples)
        return rows.kept(mask) if mask is not None and mask.shape == (len(rows), rows.raw.shape[2]) else rows

    def _laid_out(self, tensor: Tensor, samples: int) -> Rows:
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

    @property
    def places_units_second(self) -> bool:
        """Whether the module's type alone puts units on axis 1: convolutions and their norms."""
        return isinstance(self.module, _CHANNELS_SECOND)

    def channels_second(self, tensor: Tensor) -> bool:
        """Whether units lie on axis 1. The module's type decides where it can, then the number of axes."""
        if self.places_units_second:
            return True
        return tensor.ndim >= 4 and not isinstance(self.module, (nn.Linear, nn.LayerNorm)) and not _is_hf_conv1d(self.module)


class _WithoutHooks(nn.Module):
    """Runs a module's forward pass and none of its hooks, such as those that gather the parameters of a sharded one."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module.forward(x)


def pairs_of(layers: list[Layer], pairs: str | Sequence[Sequence[str]]) -> list[tuple[Layer, Layer]]:
    """Pairs of layers, in order. Raises ValueError for a name that is not among the layers, or another word."""
    if pairs == "consecutive":
        return list(itertools.pairwise(layers))
    if pairs == "all":
        return [(a, b) for k, a in enumerate(layers) for b in layers[k + 1 :]]
    by_name = {layer.name: layer for layer in layers}
    if isinstance(pairs, str):
        raise ValueError(f"pairs is {pairs!r}; it is consecutive, all, or a list of pairs of layer names")
    unknown = [name for pair in pairs for name in pair if name not in by_name]
    if unknown or any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"pairs names {unknown[0] if unknown else 'other than two layers at once'}; measured are {', '.join(by_name)}"
        )
    return [(by_name[a], by_name[b]) for a, b in pairs]


def _is_hf_conv1d(module: nn.Module) -> bool:
    return class_name(module) == "Conv1D" and hasattr(module, "nf")
