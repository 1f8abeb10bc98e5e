"""Projections: linear layers with plain weights, found by attribute name."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nodelens.network.architecture import UnclearError
from nodelens.network.groups import GroupSlice
from nodelens.network.layers import Layer


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear layer and its path in the model; GPT-2's ``Conv1D`` stores the transposed weight."""

    path: str
    module: nn.Module

    @classmethod
    def of(cls, path: str, owner: nn.Module, name: str) -> "Projection":
        """The layer with a dotted name below ``owner``, which is at ``path``. Raises UnclearError if it cannot be sliced."""
        module = child(owner, name)
        if module is None or isinstance(module, nn.modules.conv._ConvNd) or Layer(name, module).weight is None:
            raise UnclearError(f"{name} is a {type(module).__name__}, not a linear layer")
        if not plain(module._parameters.get("weight")) or set(module._parameters) - {"weight", "bias"}:
            raise UnclearError(f"the weight of {name} is quantized or computed from other tensors")
        return cls(join(path, name), module)

    @property
    def transposed(self) -> bool:
        return not isinstance(self.module, nn.Linear)

    @property
    def outputs(self) -> int:
        return self._shape[int(self.transposed)]

    @property
    def inputs(self) -> int:
        return self._shape[1 - int(self.transposed)]

    @property
    def _shape(self) -> tuple[int, ...]:
        weight: Any = self.module.weight
        return tuple(weight.shape)

    def producers(self, index: Tensor) -> list[GroupSlice]:
        """Slices of the outputs at the units' positions, (units, span): the weight and, if there is one, the bias."""
        slices = [GroupSlice(self.path, "weight", int(self.transposed), index, "producer")]
        return slices if self.module.bias is None else [*slices, GroupSlice(self.path, "bias", 0, index, "producer")]

    def consumer(self, index: Tensor) -> GroupSlice:
        """The slice of the inputs at the units' positions, (units, span)."""
        return GroupSlice(self.path, "weight", 1 - int(self.transposed), index, "consumer")


def plain(weight: Tensor | None) -> bool:
    """Whether a weight is a floating-point parameter, neither quantized nor computed from other tensors."""
    return type(weight) is nn.Parameter and weight.is_floating_point() and weight.itemsize > 1


def child(owner: nn.Module, name: str) -> nn.Module | None:
    """The module with a dotted name below another; None if there is none."""
    found: Any = owner
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, nn.Module) else None


def has(owner: nn.Module, *names: str) -> bool:
    """Whether another module contains modules with all these dotted names."""
    return all(child(owner, name) is not None for name in names)


def join(path: str, name: str) -> str:
    """A dotted name below a path; the path of the model itself is empty."""
    return f"{path}.{name}" if path and name else path or name
