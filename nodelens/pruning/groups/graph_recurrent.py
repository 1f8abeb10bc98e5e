"""Recurrent layers: the units that they read are those of any layer, their own are fed back inside one kernel."""

from typing import Any

from torch import nn

from .graph_ids import Place
from .graph_walk import Value, Walk, shape_of, stack_of, where, without_units
from .recorded import Node


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
