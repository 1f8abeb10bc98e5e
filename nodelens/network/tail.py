"""What lies between a layer and the predictions, read off the graph of derivatives: whether it is piecewise linear."""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

_LINEAR = (
    "Add", "Sub", "Neg", "Sum", "Mean", "View", "Reshape", "ReshapeAlias", "UnsafeView", "T", "Transpose", "Permute", "Expand",
    "Slice", "Select", "Index", "IndexSelect", "Gather", "Cat", "Stack", "Split", "SplitWithSizes", "Chunk", "Unbind", "Squeeze",
    "Unsqueeze", "Clone", "ToCopy", "Copy", "CopySlices", "AsStrided", "Alias", "Repeat", "Flip", "Roll", "ConstantPadNd",
    "ReflectionPad1D", "ReflectionPad2D", "ReplicationPad1D", "ReplicationPad2D", "AvgPool1D", "AvgPool2D", "AvgPool3D",
    "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "MkldnnAdaptiveAvgPool2D", "UpsampleNearest1D", "UpsampleNearest2D",
    "UpsampleNearest3D", "UpsampleBilinear2D", "PixelShuffle", "PixelUnshuffle", "Im2Col", "Col2Im", "Diagonal", "Tril", "Triu",
)  # fmt: skip
_PIECES = (
    "Relu", "LeakyRelu", "PreluKernel", "RreluWithNoise", "Threshold", "Hardtanh", "Clamp", "ClampMin", "ClampMax", "Abs",
    "Hardshrink", "Softshrink", "MaxPool1DWithIndices", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D",
    "AdaptiveMaxPool3D", "Max", "Min", "Amax", "Amin", "Maximum", "Minimum", "Where", "Sort", "Topk",
)  # fmt: skip
# linear in each argument: piecewise linear if only one of them depends on the layer
_PRODUCTS = ("Mul", "Mm", "Addmm", "Bmm", "Baddbmm", "Addbmm", "Mv", "Dot", "Convolution", "MaskedFill", "Masked", "Addmv")
# of one argument, where each entry of the result depends on the same entry of the argument alone
_ENTRYWISE = (
    "Relu", "LeakyRelu", "RreluWithNoise", "Threshold", "Hardtanh", "Hardshrink", "Softshrink", "Abs", "Neg", "Clone", "Alias",
    "Tanh", "Sigmoid", "LogSigmoid", "Gelu", "Silu", "Mish", "Elu", "Celu", "Softplus", "Hardswish", "Hardsigmoid", "Erf",
    "Exp", "Sin", "Cos",
)  # fmt: skip
_DIVIDED = ("Div",)  # linear in the first argument
_NORMS = ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")  # linear with running statistics
Node = Any


def smooth_operations(z: Tensor, edge: GradientEdge) -> list[str] | None:
    """The operations between a layer and the predictions that are not known to be piecewise linear, by name, in their order.

    Empty where the predictions are a piecewise linear function of the layer; None where they do not depend on it. Only known
    operations count: whatever a user defines does not.
    """
    if not z.requires_grad:
        return None
    nodes = reaching(get_gradient_edge(z), edge)
    if nodes is None:
        return None
    found = [name_of(node) for node, arguments in nodes if not _piecewise_linear(node, arguments)]
    return list(dict.fromkeys(found))


def reaching(root: GradientEdge, edge: GradientEdge) -> list[tuple[Node, list[int]]] | None:
    """The nodes on the paths from a root to an edge, the latter not included, each with the numbers of its arguments on a path.

    None where there is no path.
    """
    target, found = (edge.node, edge.output_nr), {}
    if (root.node, root.output_nr) == target:
        return []
    order = list(_children_first([root.node]))
    for node in order:
        arguments = [
            k
            for k, (child, nr) in enumerate(node.next_functions)
            if child is not None and ((child, nr) == target or child in found)
        ]
        if arguments:
            found[node] = arguments
    return list(found.items()) if root.node in found else None


def linear_entry(edges: Sequence[GradientEdge], leaf: Tensor) -> tuple[GradientEdge, Tensor] | None:
    """The output of a Linear that alone reads a leaf, or a view of it, and its weight (inputs, outputs); None if there is none.

    All of ``edges`` have to lie at or behind the Linear. Then J = dh/dx of each of them is dh/dy times the weight, y the output.
    """
    at: Node = get_gradient_edge(leaf).node
    readers: dict[Node, list[Node]] = {}
    for node in _children_first([edge.node for edge in edges]):
        for child, _ in node.next_functions:
            if child is not None and node not in readers.setdefault(child, []):
                readers[child].append(node)
    roots = {edge.node for edge in edges}
    while at not in roots and len(readers.get(at, ())) == 1:
        at = readers[at][0]
        if name_of(at) in ("Addmm", "Mm"):
            weight = getattr(at, "_saved_mat2", None)
            plain = at.next_functions[-2][0] is not None and getattr(at, "_saved_alpha", 1) == 1  # reads the leaf, and no multiple
            return (GradientEdge(at, 0), weight) if plain and isinstance(weight, Tensor) else None
        if name_of(at) not in ("Clone", "View", "Reshape", "ReshapeAlias", "UnsafeView"):
            return None
    return None


def is_entrywise(edge: GradientEdge, start: GradientEdge) -> bool:
    """Whether each entry of an edge is known to be a function of the same entry of a start alone."""
    at: Node = edge.node
    while at is not start.node:
        children = [child for child, _ in at.next_functions if child is not None]
        if len(children) != 1 or name_of(at) not in _ENTRYWISE:
            return False
        at = children[0]
    return True


def name_of(node: Node) -> str:
    """The operation of a node: ``Relu`` for a ReluBackward0. A function that a user defines has no number, and keeps its name."""
    return _operation(node.name())


@cache
def _operation(name: str) -> str:
    return re.sub(r"(Backward\d+|Backwards)$", "", name.rpartition("::")[2])


def _piecewise_linear(node: Node, arguments: list[int]) -> bool:
    name = name_of(node)
    if name in _NORMS:
        return arguments == [0] and not getattr(node, "_saved_training", True)
    return name in (*_LINEAR, *_PIECES) or (name in _PRODUCTS and len(arguments) == 1) or (name in _DIVIDED and arguments == [0])


def _children_first(roots: Sequence[Node]) -> Iterator[Node]:
    """Every node that can be reached, each after all those that it reads."""
    seen: set[Node] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((child, False) for child, _ in node.next_functions if child is not None and child not in seen)
