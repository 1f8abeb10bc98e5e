"""Projections: plain linear layers, as patterns of attribute names find them."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nodelens.network.architecture import UnclearError
from nodelens.network.groups import GroupSlice
from nodelens.network.layers import Layer


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear layer by its path in the model; GPT-2's ``Conv1D`` keeps the transpose: its dimensions are swapped."""

    path: str
    module: nn.Module

    @classmethod
    def of(cls, path: str, owner: nn.Module, name: str) -> "Projection":
        """The layer of a dotted name below an owner at a path. Raises UnclearError where it cannot be cut."""
        module = child(owner, name)
        if module is None or isinstance(module, nn.modules.conv._ConvNd) or Layer(name, module).weight is None:
            raise UnclearError(f"{name} is no linear layer, but {type(module).__name__}")
        if not plain(module._parameters.get("weight")) or set(module._parameters) - {"weight", "bias"}:
            raise UnclearError(f"the weight of {name} is quantised, or made of other tensors")
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

    def makes(self, index: Tensor) -> list[GroupSlice]:
        """The outputs at the units' places, (units, span), with their biases."""
        slices = [GroupSlice(self.path, "weight", int(self.transposed), index, "producer")]
        return slices if self.module.bias is None else [*slices, GroupSlice(self.path, "bias", 0, index, "producer")]

    def reads(self, index: Tensor) -> GroupSlice:
        """The inputs at the units' places, (units, span)."""
        return GroupSlice(self.path, "weight", 1 - int(self.transposed), index, "consumer")


def plain(weight: Tensor | None) -> bool:
    """Whether a weight is a parameter of floating numbers, neither quantised nor made of others when it is used."""
    return type(weight) is nn.Parameter and weight.is_floating_point() and weight.itemsize > 1


def child(owner: nn.Module, name: str) -> nn.Module | None:
    """The module below another by its dotted name; None where there is none."""
    found: Any = owner
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, nn.Module) else None


def has(owner: nn.Module, *names: str) -> bool:
    """Whether modules of these dotted names lie below another."""
    return all(child(owner, name) is not None for name in names)


def join(path: str, name: str) -> str:
    """A dotted name below a path, which is empty for the model itself."""
    return f"{path}.{name}" if path and name else path or name
