"""How products of two activations map units, as in attention: the shared dimensions are tied, and those summed over are frozen."""

import math
import string
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .graph_walk import Layout, Value, Walk, shape_of, stack_of, where
from .recorded import Node

_SAMPLES = 2  # in the batch whose operations are followed


def matmul(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """The product of two matrices, or of many that are broadcast against each other."""
    left, right = [value for value in a.values() if isinstance(value, Node)][:2]
    batch = string.ascii_lowercase[: max(len(shape_of(left)), len(shape_of(right)), 2) - 2]
    ends = ("X" if len(shape_of(left)) > 1 else "", "Z" if len(shape_of(right)) > 1 else "")
    terms = [_last(batch, left) + ends[0] + "Y", _last(batch, right) + "Y" + ends[1]]
    return contract(walk, node, [left, right], terms, batch + "".join(ends))


def _last(batch: str, operand: Node) -> str:
    """The letters of the operand's own batch dimensions."""
    own = max(0, len(shape_of(operand)) - 2)
    return batch[len(batch) - own :]


def added_product(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """A matrix product, to which another value is added."""
    product = {name: value for name, value in a.items() if name in ("mat1", "mat2", "batch1", "batch2", "vec")}
    layout = matmul(walk, node, product)
    assert isinstance(layout, Layout)
    return tie_aligned(walk, node, [layout, walk.layout(a["self"])], [shape_of(node), shape_of(a["self"])])


def einsum(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """A sum of products in Einstein's notation, with a result that is written out."""
    left, arrow, result = a["equation"].replace(" ", "").partition("->")
    operands, terms = list(a["tensors"]), left.split(",")
    if not arrow or any(len(set(term)) < len(term) for term in terms if "..." not in term):
        return walk.unknown(node)
    hidden = [len(shape_of(o)) - len(t.replace("...", "")) for o, t in zip(operands, terms, strict=True)]
    letters = "".join(c for c in string.ascii_letters if c not in left)[: max(hidden)]
    terms = [t.replace("...", letters[len(letters) - n :]) for t, n in zip(terms, hidden, strict=True)]
    return contract(walk, node, operands, terms, result.replace("...", letters))


def attention(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """softmax(q k') v: the leading dimensions are shared, of which one counts heads."""
    if a.get("enable_gqa"):
        return walk.unknown(node, "shares keys and values between heads")
    q, k, v, mask = a["query"], a["key"], a["value"], a.get("attn_mask")
    batch = string.ascii_lowercase[: len(shape_of(q)) - 2]
    operands, terms = [q, k, v], [batch + "LE", batch + "SE", batch + "SV"]
    if mask is not None:
        operands.append(mask)
        terms.append((batch + "LS")[-len(shape_of(mask)) :])
    pairs = shape_of(node)[:-1].numel() * shape_of(k)[-2]
    return contract(walk, node, operands, terms, batch + "LV", pairs * (shape_of(q)[-1] + shape_of(v)[-1]))


def contract(walk: Walk, node: Node, operands: Sequence[Node], terms: Sequence[str], result: str, macs: int | None = None) -> Value:
    """A sum of products with one letter per dimension: dimensions of the same letter are tied.

    macs: multiply-accumulates, if they are not the product of all sizes.
    """
    if macs is None:
        sizes = {letter: n for o, t in zip(operands, terms, strict=True) for letter, n in zip(t, shape_of(o), strict=True)}
        macs = math.prod(sizes.values())
    found: dict[str, Tensor | None] = {}
    for letter in dict.fromkeys("".join(terms)):
        dims = [
            (walk.layout(o), t.index(letter)) for o, t in zip(operands, terms, strict=True) if letter in t
            and shape_of(o)[t.index(letter)] > 1
        ]  # fmt: skip
        ids = tie_all(walk, node, [(layout.ids(dim), layout.source) for layout, dim in dims])
        if ids is not None and letter not in result:
            walk.ids.summed.append((ids, f"{where(node)} sums over them", stack_of(node)))
            ids = None
        elif ids is not None and len(dims) > 1:
            walk.ids.heads.append(ids)
            if walk.ids.evaluated is None:
                walk.ids.multiplied.append((ids, macs / len(ids) / _SAMPLES))
        found[letter] = ids
    return Layout(tuple(found[letter] for letter in result), where(node))


def tie_all(walk: Walk, node: Node, parts: Sequence[tuple[Tensor | None, str]]) -> Tensor | None:
    """Ties the ids along one dimension of several values, given with their origins; freezes them if one of the values has none."""
    every = [ids for ids, _ in parts if ids is not None]
    if not every:
        return None
    for ids in every[1:]:
        walk.ids.tie(every[0], ids)
    fixed = next((source for ids, source in parts if ids is None), None)
    if fixed is not None:
        walk.ids.freeze(every[0], f"{where(node)} combines them with {fixed}")
    return every[0]


def tie_aligned(walk: Walk, node: Node, layouts: Sequence[Layout], shapes: Sequence[Sequence[int]]) -> Layout:
    """Ties values of one operation that are broadcast against each other, by their last dimensions."""
    size = shape_of(node)
    dims: list[Tensor | None] = []
    for dim in range(-len(size), 0):
        parts = []
        for layout, shape in zip(layouts, shapes, strict=True):
            if -dim <= len(shape) and shape[dim] == size[dim] > 1:
                parts.append((layout.ids(dim), layout.source))
        dims.append(tie_all(walk, node, parts))
    return Layout(tuple(dims), where(node))
