"""How each operation maps channels: one rule per family of ATen operations; operations without a rule freeze their channels."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from nodelens.network.groups import Role

from .graph_ids import Place
from .graph_walk import Channels, Fixed, Value, Walk, op_of, shape_of, stack_of, where

_EACH = "alias clone contiguous copy detach divide dropout feature_dropout hardswish log_sigmoid multiply subtract to to_copy"
_MOVE = "expand expand_as flatten movedim permute repeat reshape squeeze swapaxes t transpose unflatten unsqueeze view"
_PART = "narrow select slice"
_PAD = "constant_pad_nd pad reflection_pad replication_pad"
_POOL = "adaptive_avg_pool adaptive_max_pool avg_pool max_pool"
_UPSAMPLE = "nearest nearest_exact linear bilinear bicubic trilinear"
_REDUCE = "amax amin linalg_vector_norm logsumexp max mean median min norm prod std sum var"


def follow(walk: Walk, nodes: Iterable[Node]) -> Walk:
    """Applies the rules to the nodes of an exported program, in order."""
    for node in nodes:
        if node.op == "call_function":
            walk.values[node] = _step(walk, node)
        elif node.op == "output":
            for source in node.all_input_nodes:
                walk.freeze(source, "the model's output")
        elif node.name not in walk.parameters:
            walk.values[node] = Fixed("the model's input" if node.name in walk.inputs else f"the constant {node.name}")
    return walk


def _step(walk: Walk, node: Node) -> Value:
    schema = getattr(node.target, "_schema", None)
    if op_of(node) == "getitem":  # all outputs of an operation have the same channels
        return walk.value(node.all_input_nodes[0])
    if schema is None or not schema.name.startswith("aten::"):
        return walk.unknown(node)
    a = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    a |= dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | node.kwargs
    rule = _elementwise if _pointwise(node) else _RULES.get(re.sub(r"[123]d(_with_indices)?$", "", op_of(node).strip("_")))
    return rule(walk, node, a) if rule else walk.unknown(node)


def _pointwise(node: Node) -> bool:
    """Whether torch tags the operation, or its variant that is not in place, as pointwise; the latter has more tags."""
    if not isinstance(node.meta["val"], Tensor):
        return False
    target: Any = node.target
    functional = getattr(getattr(torch.ops.aten, op_of(node).removesuffix("_"), None), target._overloadname, target)
    return torch.Tag.pointwise in {*target.tags, *functional.tags}


def _linear(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    return _layer(walk, node, a, len(shape_of(node)) - 1, 1)


def _conv(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    return _layer(walk, node, a, 1, a["groups"])


def _layer(walk: Walk, node: Node, a: dict[str, Any], dim: int, groups: int) -> Value:
    """Columns consume the input's channels, rows produce new ones; a depthwise filter is tied to the channel that it reads."""
    weight, bias, inputs = a["weight"], a.get("bias"), walk.along(a["input"], dim, node)
    outs, ins = (1, 0) if "transpose" in op_of(node) else (0, 1)
    key, why = walk.layer(node, weight, bias)
    why = why or _unsupported(node, weight, groups)
    depthwise = not why and groups > 1 and shape_of(weight)[ins] == 1
    role: Role = "tied" if depthwise else "producer"
    outputs = inputs if depthwise else walk.ids.fresh(shape_of(node)[dim])
    if why:
        walk.ids.freeze(inputs, f"{where(node)} {why}")
        walk.ids.freeze(outputs, f"{where(node)} {why}")
    elif depthwise:
        walk.ids.put(Place(key[0], "groups", 0, outputs, role, is_count=True))
    else:
        _tie_groups(walk, inputs, groups)
        _tie_groups(walk, outputs, groups)
        walk.ids.put(Place(*key, ins, inputs[: shape_of(weight)[ins]], "consumer", groups))
    walk.ids.put(Place(*key, outs, outputs, role))
    if bias is not None and bias.name in walk.parameters:
        walk.ids.put(Place(*walk.parameters[bias.name], 0, outputs, role))
    return Channels(dim, outputs)


def _unsupported(node: Node, weight: Node, groups: int) -> str:
    """The property of a layer that is not supported; "" if there is none."""
    shape = shape_of(weight)
    if "conv" in op_of(node) and len(shape_of(node)) != len(shape):
        return "reads a single sample without a batch dimension"
    if groups > 1 and "transpose" in op_of(node):
        return "is transposed and grouped"
    if groups > 1 and shape[1] == 1 and shape[0] != groups:
        return "has several filters per channel"
    return ""


def _tie_groups(walk: Walk, ids: Tensor, groups: int) -> None:
    """Ties the channels at the same position of every group, so that the groups of a convolution or norm stay equal in size."""
    if groups > 1:
        by_group = ids.reshape(groups, -1)
        walk.ids.tie(by_group[:1].expand_as(by_group).flatten(), ids)


def _channel_norm(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """Norms with statistics per channel."""
    return _normed(walk, node, a, walk.along(a["input"], 1, node), "num_features")


def _group_norm(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    ids = walk.along(a["input"], 1, node)
    _tie_groups(walk, ids, a["num_groups"])
    walk.ids.normalized.append(ids)
    return _normed(walk, node, a, ids, "num_channels")


def _normed(walk: Walk, node: Node, a: dict[str, Any], ids: Tensor, number: str) -> Value:
    for name in ("weight", "bias", "running_mean", "running_var"):
        walk.tied(a.get(name), 0, ids, node)
    if a["weight"] is None and hasattr(walk.model.get_submodule(stack_of(node)), number):
        walk.ids.put(Place(stack_of(node), number, 0, ids, "tied", is_count=True))  # no tensor has that size
    return Channels(1, ids)


def _layer_norm(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """Norms with statistics over the last dimensions, which may include the channels."""
    value, start = walk.value(a["input"]), len(shape_of(node)) - len(a["normalized_shape"])
    if isinstance(value, Fixed):
        value = Channels(len(shape_of(node)) - 1, walk.along(a["input"], -1, node))
    parameters = [p for p in (a["weight"], a.get("bias")) if p is not None]
    if value.dim < start:
        for p in parameters:
            walk.freeze(p, f"{where(node)} normalizes another dimension")
        return value
    walk.ids.normalized.append(value.ids)
    for p in parameters:
        walk.tied(p, value.dim - start, value.ids, node)
    return value


def _prelu(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    value, slopes = walk.value(a["self"]), shape_of(a["weight"])[0]
    if isinstance(value, Channels) and value.dim == 1 and slopes > 1:
        walk.tied(a["weight"], 0, value.ids, node)
        return value
    return value if slopes == 1 else walk.unknown(node)


def _elementwise(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """The channels of all operands are tied; an operand without channels must have size 1 along the channel dimension."""
    sources = [s for s in node.all_input_nodes if isinstance(s.meta.get("val"), Tensor)]
    operands: list[Channels] = []
    for source in sources:
        value = walk.value(source)
        if isinstance(value, Channels):
            dim = value.dim + len(shape_of(node)) - len(shape_of(source))
            if len(value.ids) == shape_of(node)[dim]:
                operands.append(Channels(dim, value.ids))
            else:
                walk.ids.freeze(value.ids, f"{where(node)} broadcasts one channel")
    if not operands:
        return walk.value(sources[0]) if len(sources) == 1 else Fixed(where(node))
    if len({value.dim for value in operands}) > 1:
        return walk.unknown(node, "combines channels along different dimensions")
    for source in sources:
        value, dim = walk.value(source), operands[0].dim - len(shape_of(node)) + len(shape_of(source))
        if isinstance(value, Fixed) and dim >= 0 and shape_of(source)[dim] > 1:
            walk.ids.freeze(operands[0].ids, f"{where(node)} combines them with {value.source}")
    for value in operands[1:]:
        walk.ids.tie(operands[0].ids, value.ids)
    return operands[0]


def _move(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """Operations that only move entries: they are run on the ids themselves."""
    value, shape = walk.value(a["self"]), shape_of(a["self"])
    if isinstance(value, Fixed):
        return value
    ids = value.ids.int().reshape([-1 if d == value.dim else 1 for d in range(len(shape))]).expand(shape).contiguous()
    others = [torch.empty(()).expand(shape_of(v)) if isinstance(v, Node) else v for v in node.args[1:]]
    moved = node.target(ids, *others, **node.kwargs)  # type: ignore[operator]
    for dim in sorted(range(moved.ndim), key=lambda d: (moved.shape[d] != len(value.ids), d == 0)):
        line = moved[tuple(slice(None) if d == dim else 0 for d in range(moved.ndim))]
        if (moved == line.reshape([-1] + [1] * (moved.ndim - 1 - dim))).all():
            line, part = line.long(), op_of(node) in _PART.split()
            whole = line.equal(value.ids) if part else line.unique().equal(value.ids.unique())
            return Channels(dim, line) if whole else walk.unknown(node, "selects some of the channels")
    return walk.unknown(node, "mixes channels with another dimension")


def _pool(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """The last dimensions are spatial; the operation's name says how many."""
    source, space = node.all_input_nodes[0], int(re.findall(r"([123])d", op_of(node))[0])
    value = walk.value(source)
    if isinstance(value, Channels) and value.dim >= len(shape_of(source)) - space:
        return walk.unknown(node, "pools over the channels")
    return value


def _pad(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    value, widths = walk.value(a["self"]), a["pad"] if "pad" in a else a["padding"]
    if isinstance(value, Fixed):
        return value
    first = 2 * (len(shape_of(node)) - 1 - value.dim)
    return walk.unknown(node, "changes the number of channels") if any(widths[first : first + 2]) else value


def _reduce(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    value, dims = walk.value(a["self"]), a.get("dim")
    if isinstance(value, Fixed):
        return value
    every = range(len(shape_of(a["self"])))
    reduced = {d % len(every) for d in ([dims] if isinstance(dims, int) else dims or every)}
    if value.dim in reduced:
        return walk.unknown(node, "reduces over the channels")
    return Channels(value.dim - (0 if a.get("keepdim") else sum(d < value.dim for d in reduced)), value.ids)


def _softmax(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    value = walk.value(a["self"])
    over = isinstance(value, Channels) and a["dim"] % len(shape_of(node)) == value.dim
    return walk.unknown(node, "reduces over the channels") if over else value


def _cat(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """Along the channels they are concatenated; along another dimension they are tied."""
    values = [walk.value(source) for source in a["tensors"]]
    dims = {value.dim for value in values if isinstance(value, Channels)}
    if len(dims) != 1:
        return walk.unknown(node, "combines channels along different dimensions") if dims else Fixed(where(node))
    (dim,) = dims
    parts = [walk.along(source, dim, node) for source in a["tensors"]]
    if a["dim"] % len(shape_of(node)) == dim:
        return Channels(dim, torch.cat(parts))
    for part in parts[1:]:
        walk.ids.tie(parts[0], part)
    return Channels(dim, parts[0])


Rule = Callable[[Walk, Node, dict[str, Any]], Value]
_RULES: dict[str, Rule] = {
    "linear": _linear,
    "conv": _conv,
    "conv_transpose": _conv,
    "batch_norm": _channel_norm,
    "instance_norm": _channel_norm,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "prelu": _prelu,
    "cat": _cat,
    "softmax": _softmax,
    "log_softmax": _softmax,
    **dict.fromkeys(_EACH.split(), _elementwise),
    **dict.fromkeys([*_MOVE.split(), *_PART.split()], _move),
    **dict.fromkeys(_PAD.split(), _pad),
    **dict.fromkeys(_REDUCE.split(), _reduce),
    **dict.fromkeys(_POOL.split(), _pool),
    **dict.fromkeys((f"upsample_{kind}" for kind in _UPSAMPLE.split()), _pool),
}
