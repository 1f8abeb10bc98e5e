"""State of the traversal of an exported program: the unit ids along each dimension of each value."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .graph_ids import WIDTH, Ids, Place
from .recorded import Node

Key = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Layout:
    """The unit ids along each dimension of a value, and the origin of the value for messages.

    dims: one entry per dimension: ids (size of the dimension,), or None where the dimension cannot shrink. An entry of the value
    belongs to one unit per dimension with ids, and an id may occur several times, as after flattening a feature map.
    """

    dims: tuple[Tensor | None, ...]
    source: str

    def ids(self, dim: int) -> Tensor | None:
        return self.dims[dim % len(self.dims)]

    def replaced(self, dim: int, ids: Tensor | None) -> "Layout":
        """The same layout with other ids along one dimension."""
        at = dim % len(self.dims)
        return Layout((*self.dims[:at], ids, *self.dims[at + 1 :]), self.source)


Value = Layout | tuple[Layout, ...]  # operations such as split have several results


class Walk:
    """The layouts of every value seen so far.

    parameters: {placeholder: (module, tensor)} of parameters and buffers; shared: tensors that several modules hold; inputs:
    placeholders of the model's arguments; ids: to which the units are added.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Key], shared: Collection[Key], inputs: Collection[str], ids: Ids):
        self.model, self.parameters, self.shared, self.inputs, self.ids = model, parameters, shared, inputs, ids
        self.values: dict[Node, Value] = {}

    def layout(self, node: Node) -> Layout:
        """A node's layout. Every long dimension of a parameter that is read as data has ids of its own."""
        if node not in self.values:
            module, tensor = self.parameters[node.name]
            dims = []
            for dim, size in enumerate(shape_of(node)):
                dims.append(self.ids.fresh(size) if size > 1 else None)
                if size > 1:
                    self.ids.put(Place(module, tensor, dim, dims[-1], "tied"))  # type: ignore[arg-type]
            self.values[node] = Layout(tuple(dims), f"the parameter {f'{module}.{tensor}'.lstrip('.')}")
        value = self.values[node]
        return value if isinstance(value, Layout) else value[0]

    def freeze(self, node: Node, reason: str, dims: Collection[int] | None = None) -> None:
        """Freezes the units along all or some dimensions of a value."""
        value = self.values[node] if isinstance(self.values.get(node), tuple) else self.layout(node)
        for layout in value if isinstance(value, tuple) else (value,):
            chosen = range(len(layout.dims)) if dims is None else {dim % len(layout.dims) for dim in dims}
            for dim, ids in enumerate(layout.dims):
                if ids is not None and dim in chosen:
                    self.ids.freeze(ids, reason)

    def unknown(self, node: Node, why: str = "is not understood") -> Value:
        """Freezes the units of all operands; the result has none."""
        if isinstance(node.meta.get("val"), (Tensor, list, tuple)):  # otherwise an assertion or a size
            for source in node.all_input_nodes:
                self.freeze(source, f"{where(node)} {why}")
        return without_units(node)

    def along(self, node: Node, dim: int) -> Tensor:
        """The ids along a dimension of a value; new, frozen ids if there are none."""
        layout = self.layout(node)
        ids = layout.ids(dim)
        if ids is not None:
            return ids
        ids = self.ids.fresh(shape_of(node)[dim])
        self.ids.freeze(ids, f"reads {layout.source}")
        return ids

    def tied(self, node: Node | None, dim: int, ids: Tensor) -> None:
        """Ties the entries of a parameter, such as the weight of a norm, to units."""
        own = self.layout(node).ids(dim) if node is not None else None
        if own is not None:
            self.ids.tie(own, ids)

    def owner(self, node: Node) -> nn.Module:
        """The module whose forward method runs the operation."""
        return self.model.get_submodule(stack_of(node))

    def widths(self, node: Node, candidates: Sequence[Tensor]) -> None:
        """Records the attributes, of the module that runs the operation, that are the number of the first ids that fit."""
        for name, value in vars(self.owner(node)).items():
            fits = [ids for ids in candidates if type(value) is int and len(ids) == value]
            if fits and WIDTH.search(name):
                self.ids.put(Place(stack_of(node), name, 0, fits[0], "tied", is_count=True))

    def close(self) -> Ids:
        """The ids, after freezing the units of tensors that several modules hold."""
        for place in self.ids.places.values():
            if (place.module, place.tensor) in self.shared:
                self.ids.freeze(place.ids, f"several modules share the {place.tensor} of {place.module or 'the model'}")
        return self.ids


def without_units(node: Node, source: str | None = None) -> Value:
    """The layout of a value none of whose dimensions can shrink."""
    value: Any = node.meta.get("val")
    parts = value if isinstance(value, (list, tuple)) else [value]
    layouts = tuple(Layout((None,) * getattr(part, "ndim", 0), source or where(node)) for part in parts)
    return layouts if isinstance(value, (list, tuple)) else layouts[0]


def op_of(node: Node) -> str:
    """The operation's name: ``conv2d`` of aten.conv2d.default."""
    return name_of(node.target)


@cache
def name_of(target: Any) -> str:
    """The name of an operation of an exported program."""
    parts = str(target).split(".")
    return parts[1] if len(parts) == 3 else getattr(target, "__name__", str(target))


def stack_of(node: Node) -> str:
    """The path of the module whose forward method runs the operation."""
    return [path for path, _ in (node.meta.get("nn_module_stack") or {"": ("", "")}).values()][-1]


def where(node: Node) -> str:
    """The operation and its module, for messages."""
    return f"{op_of(node)} in {stack_of(node) or 'the model'}"


def shape_of(node: Node) -> torch.Size:
    """The shape of a node's value."""
    return node.meta["val"].shape
