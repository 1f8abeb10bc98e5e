"""How layers with weights map units: a consumer's columns read them, a producer's rows make new ones, norms are tied to them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nodelens.network.groups import Role

from .graph_ids import Place
from .graph_walk import Key, Layout, Value, Walk, shape_of, stack_of, where, without_units
from .recorded import Node

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def linear(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """The last dimension has other units after the layer; the others stay."""
    return _layer(walk, node, a, len(shape_of(node)) - 1, 1)


def convolution(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """Dimension 1 has other units after the layer; positions have none."""
    walk.freeze(a["input"], f"{where(node)} mixes entries along another dimension", range(2, len(shape_of(node))))
    layout = _layer(walk, node, a, 1, a["groups"])
    return Layout((*layout.dims[:2], *(None,) * (len(layout.dims) - 2)), layout.source)


def _layer(walk: Walk, node: Node, a: dict[str, Any], dim: int, groups: int) -> Layout:
    """Columns consume the input's units, rows produce new ones; a depthwise filter is tied to the channel that it reads."""
    weight, bias, inputs = a["weight"], a.get("bias"), walk.along(a["input"], dim)
    outs, ins = (1, 0) if "transpose" in str(node.target) else (0, 1)
    key, why = _weight(walk, node, weight, bias)
    why = why or _unsupported(node, weight, groups, outs)
    depthwise = not why and groups > 1 and shape_of(weight)[1] == 1 and groups == len(inputs)
    role: Role = "tied" if depthwise else "producer"
    computed = not why and weight.name not in walk.parameters
    filters = shape_of(node)[dim] // groups
    outputs = inputs.repeat_interleave(filters) if depthwise else walk.ids.fresh(shape_of(node)[dim])
    if why:
        walk.ids.freeze(inputs, f"{where(node)} {why}")
        walk.ids.freeze(outputs, f"{where(node)} {why}")
    elif depthwise:
        walk.ids.put(Place(key[0], "groups", 0, inputs, role, is_count=True))
    else:
        tie_blocks(walk, inputs, groups)
        tie_blocks(walk, outputs, groups)
        walk.ids.layers.append((outputs, inputs))
        walk.ids.put(Place(*key, ins, inputs[: shape_of(weight)[ins]], "consumer", groups), computed)
    walk.ids.put(Place(*key, outs, outputs, role), computed)
    if computed:
        _tie_computed(walk, key, weight, {outs: outputs, ins: inputs[: shape_of(weight)[ins]]})
    if bias is not None and bias.name in walk.parameters:
        walk.ids.put(Place(*walk.parameters[bias.name], 0, outputs, role))
    return walk.layout(a["input"]).replaced(dim, outputs)


def _tie_computed(walk: Walk, key: Key, weight: Node, units: Mapping[int, Tensor]) -> None:
    """Ties the rows and columns of a weight that is computed from the module's own; {dimension: ids}."""
    for dim in range(len(shape_of(weight))):
        if dim in units:
            walk.tied(weight, dim, units[dim])
            continue
        walk.freeze(weight, "a kernel keeps its size", [dim])
        place = walk.ids.places.get((*key, dim))
        if place is not None:
            walk.ids.freeze(place.ids, "a kernel keeps its size")


def _weight(walk: Walk, node: Node, weight: Node, bias: Node | None) -> tuple[Key, str]:
    """The module and name of a layer's weight, and why it cannot be sliced: "" if it can."""
    caller = stack_of(node)
    if bias is not None and bias.name not in walk.parameters:
        return (caller, "weight"), "has a bias that is computed from others"
    if weight.name not in walk.parameters:
        module, seen = walk.model.get_submodule(caller), (caller, "weight", 0) in walk.ids.places
        plain = isinstance(module, _LAYERS) and type(module.weight) is nn.Parameter and seen and weight in walk.values
        return (caller, "weight"), "" if plain else "has weights that are computed from others (a parametrization)"
    path, tensor = walk.parameters[weight.name]
    module = walk.model.get_submodule(path)
    if tensor != "weight" or not isinstance(module, _LAYERS):
        why = f"uses the parameter {f'{path}.{tensor}'.lstrip('.')} outside a Linear or convolution module"
    elif (path, tensor) in walk.shared:
        why = "has a weight that several modules share"
    elif walk.model.get_submodule(caller) is not module:
        why = f"uses the weight of {path} without calling that module"
    elif type(module.weight) is not nn.Parameter:
        why = f"has weights of the type {type(module.weight).__name__}"
    else:
        why = ""
    return (path, tensor), why


def _unsupported(node: Node, weight: Node, groups: int, outs: int) -> str:
    """The property of a layer that is not supported; "" if there is none."""
    if "conv" in str(node.target) and len(shape_of(node)) != len(shape_of(weight)):
        return "reads a single sample without a batch dimension"
    return "is transposed and grouped" if groups > 1 and outs == 1 else ""


def tie_blocks(walk: Walk, ids: Tensor, blocks: int) -> None:
    """Ties the units at the same position of equally large blocks, so that the blocks stay equally large."""
    if blocks > 1:
        by_block = ids.reshape(blocks, -1)
        walk.ids.tie(by_block[:1].expand_as(by_block).flatten(), ids)


def channel_norm(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """Norms with statistics per channel."""
    return _normed(walk, node, a, "num_features")


def group_norm(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """Norms with statistics per group of channels, or per channel if there are as many groups."""
    ids, groups = walk.along(a["input"], 1), a["num_groups"]
    if groups == len(ids) and getattr(walk.owner(node), "num_groups", None) == groups:
        walk.ids.put(Place(stack_of(node), "num_groups", 0, ids, "tied", is_count=True))
    else:
        tie_blocks(walk, ids, groups)
        walk.ids.normalized.append(ids)
    return _normed(walk, node, a, "num_channels")


def _normed(walk: Walk, node: Node, a: dict[str, Any], number: str) -> Layout:
    ids = walk.along(a["input"], 1)
    reduced = walk.layout(a["input"])
    walk.ids.normalized.extend(other for other in reduced.dims[2:] if other is not None)
    for name in ("weight", "bias", "running_mean", "running_var"):
        walk.tied(a.get(name), 0, ids)
    if a["weight"] is None and hasattr(walk.owner(node), number):
        walk.ids.put(Place(stack_of(node), number, 0, ids, "tied", is_count=True))  # no tensor has that size
    return reduced.replaced(1, ids)


def layer_norm(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """Norms with statistics over the last dimensions, which may carry units."""
    layout, start = walk.layout(a["input"]), len(shape_of(node)) - len(a["normalized_shape"])
    for dim, ids in enumerate(layout.dims[start:]):
        if ids is not None:
            walk.ids.normalized.append(ids)
            for parameter in (a.get("weight"), a.get("bias")):
                walk.tied(parameter, dim, ids)
    return layout


def prelu(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """One slope, or one per channel."""
    layout = walk.layout(a["self"])
    if shape_of(a["weight"])[0] > 1:
        walk.tied(a["weight"], 0, walk.along(a["self"], 1))
    return layout


def embedding(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """Rows are looked up: the vocabulary stays, and entries of a row are units as in any other parameter."""
    walk.freeze(a["weight"], f"{where(node)} looks entries up", [0])
    rows = walk.layout(a["weight"])
    return Layout((*(None,) * len(shape_of(a["indices"])), *rows.dims[1:]), rows.source)


def recurrent(walk: Walk, node: Node, a: dict[str, Any]) -> Value:
    """``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``: columns of the first layer consume the input's units; hidden units are frozen.

    A hidden unit is read by the next step, too, where no hook can set it to zero, so that no mask shows what slicing does.
    """
    owner, path = walk.owner(node), stack_of(node)
    if not isinstance(owner, nn.RNNBase) or "input" not in a or owner.proj_size:
        return walk.unknown(node, "is a recurrent layer without a module of its own, with a projection, or of packed sequences")
    inputs, hidden = walk.along(a["input"], -1), owner.hidden_size
    for name in ("weight_ih_l0", "weight_ih_l0_reverse")[: 1 + owner.bidirectional]:
        own = walk.ids.fresh(hidden)
        walk.ids.freeze(own, f"{where(node)} feeds its hidden units back inside one kernel, where they cannot be masked")
        walk.ids.put(Place(path, name, 1, inputs, "consumer"))
        walk.ids.put(Place(path, name, 0, own.repeat(getattr(owner, name).shape[0] // hidden), "producer"))
    walk.ids.put(Place(path, "input_size", 0, inputs, "tied", is_count=True))
    source = a["input"]
    walk.freeze(source, f"{where(node)} reads them in order", range(len(shape_of(source)) - 1))
    return without_units(node)
