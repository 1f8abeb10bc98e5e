"""State of the traversal of an exported program: the channels of each value, and which parameters are read how."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node

from .graph_ids import Ids, Place

Key = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Channels:
    """A value whose channels, with ids (length,), lie along ``dim``."""

    dim: int
    ids: Tensor


@dataclass(frozen=True)
class Fixed:
    """A value none of whose dimensions can shrink, and its origin."""

    source: str


Value = Channels | Fixed


class Walk:
    """The channels of every value seen so far.

    parameters: {placeholder: (module, tensor)} of parameters and buffers; shared: tensors that several modules hold; inputs:
    placeholders of the model's arguments; ids: to which the channels are added.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Key], shared: Collection[Key], inputs: Collection[str], ids: Ids):
        self.model, self.parameters, self.shared, self.inputs, self.ids = model, parameters, shared, inputs, ids
        self.values: dict[Node, Value] = {}
        self.read_as_data: set[Key] = set()  # parameters with several dimensions that an operation uses like activations

    def value(self, node: Node) -> Value:
        """A node's channels; the channels of a layer scale (a parameter with one dimension longer than 1) are its entries."""
        if node not in self.values:
            module, tensor = self.parameters[node.name]
            long = [d for d, n in enumerate(shape_of(node)) if n > 1]
            if len(long) == 1:
                ids = self.ids.fresh(shape_of(node)[long[0]])
                self.ids.put(Place(module, tensor, long[0], ids, "tied"))
                self.values[node] = Channels(long[0], ids)
            else:
                self.read_as_data.add((module, tensor))
                self.values[node] = Fixed(f"the parameter {f'{module}.{tensor}'.lstrip('.')}")
        return self.values[node]

    def freeze(self, node: Node, reason: str) -> None:
        """Freezes the channels of a value."""
        value = self.value(node)
        if isinstance(value, Channels):
            self.ids.freeze(value.ids, reason)

    def unknown(self, node: Node, why: str = "is not understood") -> Value:
        """Freezes the channels of all operands; the result has no channels."""
        if not isinstance(node.meta.get("val"), (Tensor, list, tuple)):
            return Fixed(op_of(node))  # an assertion or a size
        for source in node.all_input_nodes:
            self.freeze(source, f"{where(node)} {why}")
        return Fixed(where(node))

    def along(self, node: Node, dim: int, by: Node) -> Tensor:
        """The ids along a dimension of a value; new, frozen ids if its channels lie along another dimension."""
        dim, value = dim % len(shape_of(node)), self.value(node)
        if isinstance(value, Channels) and value.dim == dim:
            return value.ids
        ids = self.ids.fresh(shape_of(node)[dim])
        if isinstance(value, Channels):
            self.ids.freeze(value.ids, f"{where(by)} mixes entries along another dimension")
        self.ids.freeze(ids, f"reads {value.source}" if isinstance(value, Fixed) else f"{where(by)} reads no channels")
        return ids

    def tied(self, node: Node | None, dim: int, ids: Tensor, by: Node) -> None:
        """Records a parameter with one entry per channel, such as the weight of a norm."""
        if node is not None and node.name in self.parameters:
            self.ids.put(Place(*self.parameters[node.name], dim, ids, "tied"))
        elif node is not None:
            self.ids.freeze(ids, f"{where(by)} has parameters that are computed from others")

    def layer(self, node: Node, weight: Node, bias: Node | None) -> tuple[Key, str]:
        """The module and name of a layer's weight, and why it cannot be sliced: "" if it can."""
        caller = stack_of(node)
        if weight.name not in self.parameters or (bias is not None and bias.name not in self.parameters):
            return (caller, "weight"), "has weights that are computed from others (a parametrization)"
        path, tensor = self.parameters[weight.name]
        module = self.model.get_submodule(path)
        if tensor != "weight" or not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            why = f"uses the parameter {f'{path}.{tensor}'.lstrip('.')} outside a Linear or convolution module"
        elif (path, tensor) in self.shared:
            why = "has a weight that several modules share"
        elif self.model.get_submodule(caller) is not module:
            why = f"uses the weight of {path} without calling that module"
        elif type(module.weight) is not nn.Parameter:
            why = f"has weights of the type {type(module.weight).__name__}"
        else:
            why = ""
        return (path, tensor), why

    def close(self) -> Ids:
        """The ids, after freezing the channels of tensors that are also used elsewhere."""
        for place in self.ids.places.values():
            name = f"{place.tensor} of {place.module or 'the model'}"
            if (place.module, place.tensor) in self.read_as_data:
                self.ids.freeze(place.ids, f"the {name} is also read outside its layer")
            elif (place.module, place.tensor) in self.shared:
                self.ids.freeze(place.ids, f"several modules share the {name}")
        return self.ids


def op_of(node: Node) -> str:
    """The operation's name: ``conv2d`` of aten.conv2d.default."""
    parts = str(node.target).split(".")
    return parts[1] if len(parts) == 3 else getattr(node.target, "__name__", str(node.target))


def stack_of(node: Node) -> str:
    """The path of the module whose forward method runs the operation."""
    return [path for path, _ in (node.meta.get("nn_module_stack") or {"": ("", "")}).values()][-1]


def where(node: Node) -> str:
    """The operation and its module, for messages."""
    return f"{op_of(node)} in {stack_of(node) or 'the model'}"


def shape_of(node: Node) -> torch.Size:
    """The shape of a node's value."""
    return node.meta["val"].shape
