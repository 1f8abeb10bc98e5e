"""A walk through an exported program: where the channels of each value lie, and what is known of its parameters."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node

from .graph_ids import Ids, Place

Key = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Channels:
    """A value whose channels lie along ``dim``, ids (length,)."""

    dim: int
    ids: Tensor


@dataclass(frozen=True)
class Fixed:
    """A value of which no dimension can shrink, and where it comes from."""

    source: str


Value = Channels | Fixed


class Walk:
    """The channels of every value so far.

    parameters: {placeholder: (module, tensor)}, buffers among them; shared: tensors that several modules hold; inputs: the
    placeholders of the model's arguments.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Key], shared: Collection[Key], inputs: Collection[str]):
        self.model, self.parameters, self.shared, self.inputs = model, parameters, shared, inputs
        self.ids = Ids()
        self.values: dict[Node, Value] = {}
        self.read: set[Key] = set()  # parameters of several dimensions that an operation reads as data

    def value(self, node: Node) -> Value:
        """A node's channels; of a parameter with one dimension longer than 1, a layer scale, the entries there."""
        if node not in self.values:
            module, tensor = self.parameters[node.name]
            long = [d for d, n in enumerate(shape_of(node)) if n > 1]
            if len(long) == 1:
                ids = self.ids.fresh(shape_of(node)[long[0]])
                self.ids.put(Place(module, tensor, long[0], ids, "tied"))
                self.values[node] = Channels(long[0], ids)
            else:
                self.read.add((module, tensor))
                self.values[node] = Fixed(f"the parameter {f'{module}.{tensor}'.lstrip('.')}")
        return self.values[node]

    def stop(self, node: Node, reason: str) -> None:
        """The channels of a value have to stay."""
        value = self.value(node)
        if isinstance(value, Channels):
            self.ids.stop(value.ids, reason)

    def unknown(self, node: Node, why: str = "is not understood") -> Value:
        """All channels that meet here have to stay; what comes out has none."""
        if not isinstance(node.meta.get("val"), (Tensor, list, tuple)):
            return Fixed(op_of(node))  # an assertion or a size
        for source in node.all_input_nodes:
            self.stop(source, f"{where(node)} {why}")
        return Fixed(where(node))

    def along(self, node: Node, dim: int, by: Node) -> Tensor:
        """The ids along a dimension of a value; new ones that have to stay where its channels lie elsewhere."""
        dim, value = dim % len(shape_of(node)), self.value(node)
        if isinstance(value, Channels) and value.dim == dim:
            return value.ids
        ids = self.ids.fresh(shape_of(node)[dim])
        if isinstance(value, Channels):
            self.ids.stop(value.ids, f"{where(by)} mixes another dimension than theirs")
        self.ids.stop(ids, f"reads {value.source}" if isinstance(value, Fixed) else f"{where(by)} reads no channels")
        return ids

    def tied(self, node: Node | None, dim: int, ids: Tensor, by: Node) -> None:
        """A parameter with an entry a channel, such as a norm's."""
        if node is not None and node.name in self.parameters:
            self.ids.put(Place(*self.parameters[node.name], dim, ids, "tied"))
        elif node is not None:
            self.ids.stop(ids, f"{where(by)} has parameters that are computed")

    def layer(self, node: Node, weight: Node, bias: Node | None) -> tuple[Key, str]:
        """The module and name of a layer's weight, and what speaks against cutting it: "" if nothing does."""
        here = stack_of(node)
        if weight.name not in self.parameters or (bias is not None and bias.name not in self.parameters):
            return (here, "weight"), "has weights that are computed (a parametrisation)"
        module, tensor = self.parameters[weight.name]
        found = self.model.get_submodule(module)
        if tensor != "weight" or not isinstance(found, (nn.Linear, nn.modules.conv._ConvNd)):
            why = f"uses the parameter {f'{module}.{tensor}'.lstrip('.')} outside of a Linear or convolution module"
        elif (module, tensor) in self.shared:
            why = "has a weight that several modules share"
        elif self.model.get_submodule(here) is not found:
            why = f"uses the weight of {module} without calling it"
        elif type(found.weight) is not nn.Parameter:
            why = f"has weights of the type {type(found.weight).__name__}"
        else:
            why = ""
        return (module, tensor), why

    def close(self) -> Ids:
        """All that was found, without what other uses of a tensor forbid."""
        for place in self.ids.places.values():
            name = f"{place.tensor} of {place.module or 'the model'}"
            if (place.module, place.tensor) in self.read:
                self.ids.stop(place.ids, f"the {name} is also read outside of its layer")
            elif (place.module, place.tensor) in self.shared:
                self.ids.stop(place.ids, f"several modules share the {name}")
        return self.ids


def op_of(node: Node) -> str:
    """The operation's name: ``conv2d`` of aten.conv2d.default."""
    parts = str(node.target).split(".")
    return parts[1] if len(parts) == 3 else getattr(node.target, "__name__", str(node.target))


def stack_of(node: Node) -> str:
    """The path of the module in whose forward an operation runs."""
    return [path for path, _ in (node.meta.get("nn_module_stack") or {"": ("", "")}).values()][-1]


def where(node: Node) -> str:
    """The operation and its module, in words."""
    return f"{op_of(node)} in {stack_of(node) or 'the model'}"


def shape_of(node: Node) -> torch.Size:
    """The shape of a node's value."""
    return node.meta["val"].shape
