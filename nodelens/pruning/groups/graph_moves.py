"""How operations that only move entries map units: reshapes, permutations, parts and concatenations."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .graph_contractions import tie_all
from .graph_ids import Place, Product
from .graph_layers import tie_blocks
from .graph_walk import Layout, Value, Walk, op_of, shape_of, stack_of, where
from .recorded import Node

_JOINS = {"hstack": 1, "vstack": 0, "dstack": 2}


def reshape(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """Dimensions are split and merged: what carried units still does, and the sizes in between become products."""
    old, new = shape_of(node.all_input_nodes[0]), shape_of(node)
    if math.prod(old) != math.prod(new) or 0 in old:
        return walk.unknown(node)
    layout = walk.layout(node.all_input_nodes[0])
    dims: list[Tensor | None] = [None] * len(new)
    for before, after in _matching(old, new):
        for dim, ids in _regrouped(walk, node, [(old[d], layout.dims[d]) for d in before], [new[d] for d in after]).items():
            dims[after[dim]] = ids
    return Layout(tuple(dims), layout.source)


def _matching(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of dimensions with the same number of entries; dimensions of size 1 are left out."""
    i, j = ([d for d, n in enumerate(shape) if n > 1][::-1] for shape in (old, new))
    runs = []
    while i and j:
        before, after = [i.pop()], [j.pop()]
        while (m := math.prod(old[d] for d in before)) != (n := math.prod(new[d] for d in after)):
            (before if m < n else after).append((i if m < n else j).pop())
        runs.append((before, after))
    return runs


def _regrouped(
    walk: Walk, node: Node, before: Sequence[tuple[int, Tensor | None]], after: Sequence[int]
) -> dict[int, Tensor | None]:
    """The ids along the dimensions of a run after a reshape, from sizes and ids before it."""
    if all(ids is None for _, ids in before):
        return {}
    return _split(walk, node, before[0][1] if len(before) == 1 else _merged(walk, node, before), after)


def _merged(walk: Walk, node: Node, dims: Sequence[tuple[int, Tensor | None]]) -> Tensor:
    """The ids of a dimension that several are merged into."""
    shape = [1 if ids is None else size for size, ids in dims]
    factors = tuple(ids for _, ids in dims if ids is not None)
    if len(factors) == 1:
        whole = factors[0]
    else:
        rows = [_distinct(factor) for factor in factors]
        grid = walk.ids.fresh(math.prod(len(row.unique()) for row in rows)).reshape([len(row.unique()) for row in rows])
        _multiply(walk, node, grid, tuple(_first(f, r) for f, r in zip(factors, rows, strict=True)))
        whole = grid[torch.meshgrid(*rows, indexing="ij")]
    return whole.reshape(shape).expand([size for size, _ in dims]).flatten()


def _split(walk: Walk, node: Node, whole: Tensor | None, sizes: Sequence[int]) -> dict[int, Tensor | None]:
    """The ids along the dimensions that a dimension with ids is split into."""
    assert whole is not None
    grid = whole.reshape(list(sizes))
    varying = [d for d in range(grid.ndim) if not grid.equal(grid.narrow(d, 0, 1).expand_as(grid))]
    for d in reversed(range(grid.ndim)):
        grid = grid if d in varying else grid.select(d, 0)
    if len(varying) < 2:
        return {varying[0]: grid} if varying else {len(sizes) - 1: whole[: sizes[-1]]}
    rows = [grid.movedim(k, 0).flatten(1).unique(dim=0, return_inverse=True)[1] for k in range(grid.ndim)]
    rows = [_ordered(row) for row in rows]
    factors = tuple(walk.ids.fresh(int(row.max()) + 1) for row in rows)
    for k, row in enumerate(rows):
        grid = grid.index_select(k, _first(torch.arange(len(row)), row))
    _multiply(walk, node, grid, factors)
    return {d: factor[row] for d, factor, row in zip(varying, factors, rows, strict=True)}


def _multiply(walk: Walk, node: Node, grid: Tensor, factors: tuple[Tensor, ...]) -> None:
    numbers = {k: v for k, v in vars(walk.owner(node)).items() if type(v) is int}
    walk.ids.products.append(Product(grid, factors, stack_of(node), numbers))


def _distinct(ids: Tensor) -> Tensor:
    """For each position, the number of its id in order of appearance."""
    return _ordered(ids.unique(return_inverse=True)[1])


def _ordered(rows: Tensor) -> Tensor:
    """Labels, renumbered in the order of their first appearance."""
    return _first(torch.arange(len(rows)), rows).argsort().argsort()[rows]


def _first(values: Tensor, rows: Tensor) -> Tensor:
    """The value at the first position of each label."""
    first = torch.full((int(rows.max()) + 1,), len(rows)).scatter_reduce(0, rows, torch.arange(len(rows)), "amin")
    return values[first]


def permute(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """The operation is run on a shape whose sizes tell its dimensions apart."""
    layout = walk.layout(node.all_input_nodes[0])
    marked = torch.empty(tuple(range(2, 2 + len(layout.dims))), device="meta")
    moved = node.target(marked, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return Layout(tuple(layout.dims[size - 2] for size in moved.shape), layout.source)


def expand(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """Dimensions of size 1 grow, and new ones come in front."""
    layout = walk.layout(node.all_input_nodes[0])
    return Layout((*(None,) * (len(shape_of(node)) - len(layout.dims)), *layout.dims), layout.source)


def repeat(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """The whole value, several times along some dimensions."""
    layout = walk.layout(a["self"])
    times = list(a["repeats"] if "repeats" in a else a["dims"])
    more = len(shape_of(node)) - len(layout.dims)
    dims = [*(None,) * more, *layout.dims]
    times = [1] * (len(dims) - len(times)) + times
    return Layout(tuple(None if ids is None else ids.repeat(n) for ids, n in zip(dims, times, strict=True)), layout.source)


def repeat_interleave(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """Each position of a dimension, several times."""
    if a.get("dim") is None or not isinstance(a["repeats"], int):
        return walk.unknown(node)
    layout = walk.layout(a["self"])
    ids = layout.ids(a["dim"])
    return layout if ids is None else layout.replaced(a["dim"], ids.repeat_interleave(a["repeats"]))


def flip(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """Some dimensions in reverse order."""
    layout = walk.layout(a["self"])
    for dim in a["dims"]:
        ids = layout.ids(dim)
        layout = layout if ids is None else layout.replaced(dim, ids.flip(0))
    return layout


def roll(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """A rotation by a constant."""
    walk.freeze(a["self"], f"{where(node)} moves entries along them", a["dims"] or range(len(shape_of(node))))
    return walk.layout(a["self"])


def part(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """A range of positions: one of several equally large blocks, or units after some that stay."""
    source, dim = a["self"], a.get("dim", 0) or 0
    layout, size = walk.layout(source), shape_of(source)[dim]
    ids = layout.ids(dim)
    if ids is None:
        return layout
    step, length = a.get("step") or 1, shape_of(node)[dim]
    start = a.get("start") or 0
    start = min(start + size if start < 0 else start, size)
    if step > 1:
        if start >= step or size % step or length * step != size:
            walk.ids.freeze(ids, f"{where(node)} selects some of the channels")
        else:
            pairs = ids.reshape(-1, step)
            walk.ids.tie(pairs[:, :1].expand_as(pairs).flatten(), ids)
    elif length < size and size % length == 0 and start % length == 0:
        tie_blocks(walk, ids, size // length)
    elif length < size:
        last = start + length if start + length < size else start  # the positions in the code are constants
        walk.ids.freeze(ids[:last], f"{where(node)} selects some of the channels")
    return layout.replaced(dim, ids[start : start + length * step : step])


def select(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """One position of a dimension, which therefore cannot shrink."""
    layout, dim = walk.layout(a["self"]), a["dim"] % len(shape_of(a["self"]))
    walk.freeze(a["self"], f"{where(node)} selects some of the channels", [dim])
    return Layout((*layout.dims[:dim], *layout.dims[dim + 1 :]), layout.source)


def unbind(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """Every position of a dimension, one by one."""
    one = select(walk, node, a)
    assert isinstance(one, Layout)
    return (one,) * len(node.meta["val"])


def split(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """Equally large blocks lose the same units; the sizes of others are constants in the code."""
    source, dim = a["self"], a.get("dim") or 0
    layout, ids = walk.layout(source), walk.layout(source).ids(dim)
    sizes = [part.shape[dim] for part in node.meta["val"]]
    if ids is None:
        return (layout,) * len(sizes)
    if len(set(sizes)) == 1:
        tie_blocks(walk, ids, len(sizes))
        if "split" in str(node.target):
            walk.widths(node, (ids[: sizes[0]], ids))
    else:
        _unequal(walk, node, ids, sizes)
    return tuple(layout.replaced(dim, block) for block in ids.split(sizes))


def _unequal(walk: Walk, node: Node, ids: Tensor, sizes: Sequence[int]) -> None:
    """Blocks of different sizes: one that is an attribute of the module can shrink; another is a constant of the code."""
    owner, by_size = vars(walk.owner(node)), dict[int, list[Tensor]]()
    for block in ids.split(list(sizes)):
        by_size.setdefault(len(block), []).append(block)
    for size, blocks in by_size.items():
        names = [name for name, value in owner.items() if type(value) is int and value == size > 1]
        if names:
            tie_blocks(walk, torch.cat(blocks), len(blocks))
        else:
            every = ", ".join(map(str, sizes))
            walk.ids.freeze(torch.cat(blocks), f"{where(node)} takes blocks of {every} units, which are constants of the code")
        for name in names:
            walk.ids.put(Place(stack_of(node), name, 0, blocks[0], "tied", is_count=True))


def gate(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """The first half, each unit with the gate in the second half that multiplies it."""
    layout = walk.layout(a["self"])
    ids = layout.ids(a["dim"])
    if ids is None:
        return layout
    tie_blocks(walk, ids, 2)
    return layout.replaced(a["dim"], ids[: len(ids) // 2])


def interleave(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """Groups of channels are interleaved: every group loses the same positions."""
    layout, ids = walk.layout(node.all_input_nodes[0]), walk.along(node.all_input_nodes[0], 1)
    tie_blocks(walk, ids, a["groups"])
    return layout.replaced(1, ids.reshape(a["groups"], -1).T.flatten())


def concatenate(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """Along the dimension of the concatenation ids follow each other; along the others they are tied."""
    sources = [source for source in a["tensors"] if len(shape_of(source)) == len(shape_of(node))]
    at, layouts = _JOINS.get(op_of(node), a.get("dim", 0)) % len(shape_of(node)), [walk.layout(source) for source in sources]
    dims: list[Tensor | None] = []
    for dim in range(len(shape_of(node))):
        if dim != at:
            dims.append(tie_all(walk, node, [(layout.dims[dim], layout.source) for layout in layouts]))
        elif any(layout.dims[dim] is not None for layout in layouts):
            dims.append(torch.cat([walk.along(source, dim) for source in sources]))
        else:
            dims.append(None)
    return Layout(tuple(dims), where(node))


def stack(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """Values of the same shape along a new dimension."""
    layouts, at = [walk.layout(source) for source in a["tensors"]], a.get("dim", 0) % len(shape_of(node))
    dims = [tie_all(walk, node, [(layout.dims[d], layout.source) for layout in layouts]) for d in range(len(layouts[0].dims))]
    return Layout((*dims[:at], None, *dims[at:]), where(node))


def pad(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """Dimensions with units keep their size, or the units are frozen."""
    layout, widths = walk.layout(a["self"]), a["pad"] if "pad" in a else a["padding"]
    for k in range(0, len(widths), 2):
        dim = len(layout.dims) - 1 - k // 2
        if any(widths[k : k + 2]) and layout.dims[dim] is not None:
            walk.freeze(a["self"], f"{where(node)} changes the number of channels", [dim])
            layout = layout.replaced(dim, None)
    return layout


def lookup(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """Entries at given positions: the dimensions that are indexed cannot shrink."""
    if "indices" in a:
        indices = list(a["indices"])
        at = [d for d, index in enumerate(indices) if index is not None]
    else:
        indices, at = [a["index"]], [a["dim"] % len(shape_of(a["self"]))]
    layout = walk.layout(a["self"])
    walk.freeze(a["self"], f"{where(node)} looks entries up", at)
    rest = len(shape_of(node)) - (len(layout.dims) - len(at))  # dimensions of the indices
    together = at == list(range(at[0], at[-1] + 1))
    dims: list[Tensor | None] = [ids for d, ids in enumerate(layout.dims) if d not in at]
    first = at[0] if together else 0
    return Layout((*dims[:first], *(None,) * rest, *dims[first:]), layout.source)
