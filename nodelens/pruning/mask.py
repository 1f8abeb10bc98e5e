"""Removing by a mask: gates of 0 and 1 on what passes; nothing is copied, nothing to restore."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..frame import Frame
from ..hooks import edit
from ..layers import Layer
from ..recording import Recording
from .removal import RemovalPlan


def gates(model: nn.Module, layers: Iterable[Layer], frame: Frame) -> dict[str, Layer]:
    """Where a layer's units are shut off: at the batch norm that reads its output, else at the layer itself.

    Zeroing before the norm would leave its shift in the channel; zero passes through ReLU, GELU, SiLU and pooling as zero.
    Found by one recorded forward of a few samples: whose output is the very tensor that a norm reads.
    """
    layers = list(layers)
    norms = Recording.of(model, layers, frame).norms
    return {layer.name: norms.get(layer.name, layer) for layer in layers}


@contextmanager
def masked(gates: Mapping[str, Layer], plan: RemovalPlan) -> Iterator[None]:
    """Inside, the plan's units put out zero. Raises ValueError for a layer that has no gate, or a unit it does not have."""
    unknown = [name for name in plan.removed if name not in gates]
    if unknown:
        raise ValueError(f"the plan removes units of {', '.join(unknown)}; there are gates for {', '.join(gates)}")
    with edit({gates[name].module: _Shut(gates[name], units) for name, units in plan.removed.items()}):
        yield


class _Shut:
    """Zeros at some units of what a layer puts out."""

    def __init__(self, layer: Layer, units: Iterable[int]):
        self.layer, self.units = layer, torch.tensor(list(units))

    def __call__(self, output: Tensor) -> Tensor:
        axis = 1 if self.layer.channels_second(output) else output.ndim - 1
        width = output.shape[axis]
        if int(self.units.max()) >= width:
            raise ValueError(f"layer {self.layer.name!r} has {width} units, the plan removes unit {int(self.units.max())}")
        return output.index_fill(axis, self.units.to(output.device), 0)
