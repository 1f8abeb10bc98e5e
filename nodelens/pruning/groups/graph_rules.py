"""How each operation maps units: one rule per family of ATen operations; operations without a rule freeze the units they read."""

import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import graph_contractions, graph_layers, graph_moves, graph_windows
from .graph_walk import Layout, Value, Walk, name_of, op_of, shape_of, where, without_units
from .recorded import Node

_EACH = """alias clone contiguous copy detach divide dropout feature_dropout alpha_dropout hardswish log_sigmoid multiply subtract
to to_copy zeros_like ones_like full_like empty_like rand_like randn_like lift_fresh_copy type_as bernoulli fake_quantize"""
_NEW = "zeros ones full empty arange linspace eye new_zeros new_ones new_full new_empty scalar_tensor tril_indices triu_indices"
_RESHAPE = "flatten reshape reshape_as squeeze unflatten unsqueeze unsafe_view view view_as"
_PERMUTE = "movedim moveaxis numpy_T permute swapaxes swapdims t transpose mT"
_PAD = "constant_pad_nd pad reflection_pad replication_pad"
_POOL = "adaptive_avg_pool adaptive_max_pool avg_pool max_pool"
_UPSAMPLE = "nearest nearest_exact linear bilinear bicubic trilinear"
_REDUCE = "amax amin linalg_vector_norm logsumexp max mean median min norm prod std sum var var_mean std_mean all any"


def follow(walk: Walk, nodes: Iterable[Node]) -> Walk:
    """Applies the rules to the nodes of an exported program, in order."""
    for node in nodes:
        if node.op == "call_function":
            walk.values[node] = _step(walk, node)
        elif node.op == "output":
            for source in node.all_input_nodes:
                walk.freeze(source, "the model's output")
        elif node.name not in walk.parameters:
            name = "the model's input" if node.name in walk.inputs else f"the constant {node.name}"
            walk.values[node] = without_units(node, name)
    return walk


def _step(walk: Walk, node: Node) -> Value:
    schema = getattr(node.target, "_schema", None)
    if op_of(node) == "getitem":
        value = walk.values[node.all_input_nodes[0]]
        return value[node.args[1]] if isinstance(value, tuple) else value  # type: ignore[index]
    if schema is None or not schema.name.startswith("aten::"):
        return walk.unknown(node)
    names, defaults, pointwise, rule = _known(node.target)
    a = defaults | dict(zip(names, node.args, strict=False)) | node.kwargs
    rule = _elementwise if pointwise and isinstance(node.meta["val"], Tensor) else rule
    return rule(walk, node, a) if rule else walk.unknown(node)


@cache
def _known(target: Any) -> tuple[list[str], dict[str, Any], bool, "Rule | None"]:
    """Of an ATen operation: its arguments, their defaults, whether it is pointwise, and the rule of its family.

    Torch tags operations as pointwise, or their variants that are not in place, which have more tags.
    """
    name, arguments = name_of(target), target._schema.arguments
    functional = getattr(getattr(torch.ops.aten, name.removesuffix("_"), None), target._overloadname, target)
    pointwise = torch.Tag.pointwise in {*target.tags, *functional.tags}
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    rule = _RULES.get(re.sub(r"[123]d(_with_indices)?$", "", name.strip("_")))
    return [argument.name for argument in arguments], defaults, pointwise, rule


def _new(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    return without_units(node)


def _elementwise(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """The units of all operands are tied, dimension by dimension; an operand of size 1 along a dimension takes no part in it."""
    sources = [s for s in node.all_input_nodes if isinstance(s.meta.get("val"), Tensor)]
    if not sources or not isinstance(node.meta["val"], Tensor):
        return walk.unknown(node)
    if len(sources) == 1 and shape_of(sources[0]) == shape_of(node):
        return walk.layout(sources[0])
    return graph_contractions.tie_aligned(walk, node, [walk.layout(s) for s in sources], [shape_of(s) for s in sources])


def _pool(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """The last dimensions are spatial; the operation's name says how many."""
    source, space = node.all_input_nodes[0], int(re.findall(r"([123])d", op_of(node))[0])
    layout = walk.layout(source)
    start = len(layout.dims) - space
    walk.freeze(source, f"{where(node)} pools over the channels", range(start, len(layout.dims)))
    return Layout((*layout.dims[:start], *(None,) * space), layout.source)


def _reduce(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """The units of a dimension that is reduced influence each other, as under a norm."""
    sources = [s for s in node.all_input_nodes if isinstance(s.meta.get("val"), Tensor)]
    if len(sources) > 1:  # the larger of two tensors
        return _elementwise(walk, node, a)
    layout, dims = walk.layout(a["self"]), a.get("dim")
    every = range(len(layout.dims))
    reduced = {d % len(every) for d in ([dims] if isinstance(dims, int) else dims or every)}
    walk.ids.normalized.extend(ids for d, ids in enumerate(layout.dims) if d in reduced and ids is not None)
    kept = [None if d in reduced else ids for d, ids in enumerate(layout.dims) if d not in reduced or a.get("keepdim")]
    return Layout(tuple(kept), layout.source)


def _softmax(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    layout = walk.layout(a["self"])
    ids = layout.ids(a["dim"])
    walk.ids.normalized.extend([] if ids is None else [ids])
    return layout


Rule = Callable[[Walk, Node, dict[str, Any]], Value]
_RULES: dict[str, Rule] = {
    "linear": graph_layers.linear,
    "conv": graph_layers.convolution,
    "conv_transpose": graph_layers.convolution,
    "batch_norm": graph_layers.channel_norm,
    "instance_norm": graph_layers.channel_norm,
    "group_norm": graph_layers.group_norm,
    "layer_norm": graph_layers.layer_norm,
    "rms_norm": graph_layers.layer_norm,
    "prelu": graph_layers.prelu,
    "embedding": graph_layers.embedding,
    "matmul": graph_contractions.matmul,
    "bmm": graph_contractions.matmul,
    "mm": graph_contractions.matmul,
    "addmm": graph_contractions.added_product,
    "baddbmm": graph_contractions.added_product,
    "einsum": graph_contractions.einsum,
    "scaled_dot_product_attention": graph_contractions.attention,
    "cat": graph_moves.concatenate,
    "concat": graph_moves.concatenate,
    "hstack": graph_moves.concatenate,
    "vstack": graph_moves.concatenate,
    "dstack": graph_moves.concatenate,
    "glu": graph_moves.gate,
    "channel_shuffle": graph_moves.interleave,
    "native_channel_shuffle": graph_moves.interleave,
    "stack": graph_moves.stack,
    "expand": graph_moves.expand,
    "expand_as": graph_moves.expand,
    "broadcast_to": graph_moves.expand,
    "repeat": graph_moves.repeat,
    "tile": graph_moves.repeat,
    "repeat_interleave": graph_moves.repeat_interleave,
    "roll": graph_moves.roll,
    "flip": graph_moves.flip,
    "slice": graph_moves.part,
    "narrow": graph_moves.part,
    "select": graph_moves.select,
    "unbind": graph_moves.unbind,
    "split": graph_moves.split,
    "split_with_sizes": graph_moves.split,
    "chunk": graph_moves.split,
    "tensor_split": graph_moves.split,
    "pixel_shuffle": graph_windows.shuffle,
    "pixel_unshuffle": graph_windows.shuffle,
    "unfold": graph_windows.windows,
    "im2col": graph_windows.patches,
    "col2im": graph_windows.patches,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), graph_layers.recurrent),
    "index": graph_moves.lookup,
    "index_select": graph_moves.lookup,
    "softmax": _softmax,
    "log_softmax": _softmax,
    **dict.fromkeys(_EACH.split(), _elementwise),
    **dict.fromkeys(_NEW.split(), _new),
    **dict.fromkeys(_RESHAPE.split(), graph_moves.reshape),
    **dict.fromkeys(_PERMUTE.split(), graph_moves.permute),
    **dict.fromkeys(_PAD.split(), graph_moves.pad),
    **dict.fromkeys(_REDUCE.split(), _reduce),
    **dict.fromkeys(_POOL.split(), _pool),
    **dict.fromkeys((f"upsample_{kind}" for kind in _UPSAMPLE.split()), _pool),
}
