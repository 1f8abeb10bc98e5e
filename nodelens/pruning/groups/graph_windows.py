"""How operations that exchange channels and positions map units: windows of a map, and blocks of pixels."""

import math
from typing import Any

from .graph_walk import Layout, Value, Walk, op_of, shape_of, where
from .recorded import Node


def windows(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """``Tensor.unfold``: a dimension of positions becomes one of windows, and one of positions in a window."""
    walk.freeze(a["self"], f"{where(node)} reads windows of entries along them", [a["dimension"]])
    layout = walk.layout(a["self"]).replaced(a["dimension"], None)
    return Layout((*layout.dims, None), layout.source)


def patches(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """``F.unfold`` writes each channel's block of pixels as neighbours, and ``F.fold`` adds them up again."""
    layout, pixels = walk.layout(a["self"]), math.prod(a["kernel_size"])
    if op_of(node) == "im2col":
        ids = layout.ids(-3)
        walk.freeze(a["self"], f"{where(node)} reads windows of entries along them", [-1, -2])
        return Layout((*layout.dims[:-3], None if ids is None else ids.repeat_interleave(pixels), None), layout.source)
    ids = layout.ids(-2)
    walk.freeze(a["self"], f"{where(node)} adds entries up along them", [-1])
    if ids is not None:
        blocks = ids.reshape(-1, pixels)
        walk.ids.tie(blocks[:, :1].expand_as(blocks).flatten(), ids)
        ids = blocks[:, 0]
    return Layout((*layout.dims[:-2], ids, None, None), layout.source)


def shuffle(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """Channels and blocks of pixels are exchanged: each unit has as many channels as the block has pixels."""
    layout, old, new = walk.layout(a["self"]), shape_of(a["self"])[-3], shape_of(node)[-3]
    walk.freeze(a["self"], f"{where(node)} moves entries along them", [len(layout.dims) - 2, len(layout.dims) - 1])
    ids = layout.ids(-3)
    if ids is None:
        return layout
    if new > old:
        return layout.replaced(-3, ids.repeat_interleave(new // old))
    by_block = ids.reshape(new, -1)
    walk.ids.tie(by_block[:, :1].expand_as(by_block).flatten(), ids)
    return layout.replaced(-3, by_block[:, 0])
