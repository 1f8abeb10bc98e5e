"""Projections: linear layers with plain weights, found by attribute name."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nodelens.network.adapters import Adapter, adapters_of
from nodelens.network.architecture import UnclearError
from nodelens.network.groups import GroupSlice, Role
from nodelens.network.layers import Layer


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear layer and its path in the model; GPT-2's ``Conv1D`` stores the transposed weight.

    adapters: those beside it, with paths in the model
    """

    path: str
    module: nn.Module
    adapters: tuple[Adapter, ...] = ()

    @classmethod
    def of(cls, path: str, owner: nn.Module, name: str) -> "Projection":
        """The layer with a dotted name below ``owner``, which is at ``path``. Raises UnclearError if it cannot be sliced."""
        module, adapters = child(owner, name), tuple[Adapter, ...]()
        inner = None if module is None else child(module, "base_layer")
        if module is not None and inner is not None:
            adapters = _adapters(join(path, name), module, name)
            module, path = inner, join(path, name)
            name = "base_layer"
        if module is None or isinstance(module, nn.modules.conv._ConvNd) or Layer(name, module).weight is None:
            raise UnclearError(f"{name} is a {type(module).__name__}, not a linear layer")
        if not plain(module._parameters.get("weight")) or set(module._parameters) - {"weight", "bias"}:
            raise UnclearError(f"the weight of {name} is quantized or computed from other tensors")
        return cls(join(path, name), module, adapters)

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
        """Slices of the outputs at the units' positions, (units, span): the weights and the biases, those of adapters too."""
        slices = [GroupSlice(self.path, "weight", int(self.transposed), index, "producer")]
        slices += [] if self.module.bias is None else [GroupSlice(self.path, "bias", 0, index, "producer")]
        for each in self.adapters:
            names = ["weight", *(["bias"] if each.biased else [])]
            slices += [GroupSlice(each.up, name, 0, index, "tied") for name in names]
        return slices

    def consumers(self, index: Tensor) -> list[GroupSlice]:
        """Slices of the inputs at the units' positions, (units, span); adapters that do not run read nothing."""
        own = GroupSlice(self.path, "weight", 1 - int(self.transposed), index, "consumer")
        roles: list[Role] = ["consumer" if each.runs else "tied" for each in self.adapters]
        return [own, *(GroupSlice(a.down, "weight", 1, index, role) for a, role in zip(self.adapters, roles, strict=True))]


def _adapters(path: str, wrapper: nn.Module, name: str) -> tuple[Adapter, ...]:
    try:
        found = adapters_of(wrapper)
    except ValueError as error:
        raise UnclearError(f"{name} {error}") from error
    return tuple(each._replace(down=join(path, each.down), up=join(path, each.up)) for each in found)


def plain(weight: Tensor | None) -> bool:
    """Whether a weight is a floating-point parameter, neither quantized nor computed from other tensors."""
    return type(weight) is nn.Parameter and weight.is_floating_point() and weight.itemsize > 1


def attribute(owner: Any, name: str) -> Any:
    """An attribute with a dotted name, such as ``config.num_heads``; None where there is none."""
    for part in name.split("."):
        owner = getattr(owner, part, None)
    return owner


def child(owner: nn.Module, name: str) -> nn.Module | None:
    """The module with a dotted name below another; None if there is none."""
    found = attribute(owner, name)
    return found if isinstance(found, nn.Module) else None


def has(owner: nn.Module, *names: str) -> bool:
    """Whether another module contains modules with all these dotted names."""
    return all(child(owner, name) is not None for name in names)


def join(path: str, name: str) -> str:
    """A dotted name below a path; the path of the model itself is empty."""
    return f"{path}.{name}" if path and name else path or name
