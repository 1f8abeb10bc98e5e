"""The axes of any model: by the names of its parts where these are a transformer's, else from its graph."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from torch import nn

from ..frame import Frame
from .axis import Axes, Axis, Cut, Role, identity
from .families import family_axes
from .graph import graph_axes


def find_axes(model: nn.Module, frame: Frame | None = None, extra: Sequence[Axis | Mapping[str, Any]] = ()) -> Axes:
    """Every axis of a model and what is frozen, inexact axes included; ``extra`` adds some written by hand.

    frame: a batch, from whose first samples the graph of a model without transformer blocks is read. Raises ValueError where
    that is needed and not there, the model cannot be exported, or a hand-written axis does not fit.
    """
    found = family_axes(model)
    if not len(found) and not (extra and frame is None):
        if frame is None:
            raise ValueError(
                f"the axes of {type(model).__name__} are read from its graph, and that needs an input: give data= or "
                "example_inputs="
            )
        found = graph_axes(model, frame)
    written = tuple(axis if isinstance(axis, Axis) else written_axis(model, axis) for axis in extra)
    named = {axis.name for axis in written}
    apart = tuple(a for a in found.apart if a.name not in named)
    return Axes((*(a for a in found if a.name not in named), *written), found.frozen, apart)


def written_axis(model: nn.Module, given: Mapping[str, Any]) -> Axis:
    """An axis of {name, kind, producer: [tensors], consumer: [tensors], tied: [tensors]}, unit u at place u of each.

    A tensor is named as in the state dict, with ``@1`` behind it where another dimension than 0 (consumer: 1) is meant. Raises
    ValueError for tensors that are not there or of different lengths.
    """
    roles = get_args(Role)
    name = str(given.get("name", ""))
    if not name or set(given) - {"name", "kind", *roles}:
        raise ValueError(f"an axis written by hand has a name, a kind and the tensors of {', '.join(roles)}, not {dict(given)}")
    cuts = []
    for role in roles:
        for text in given.get(role) or ():
            path, _, dim = str(text).partition("@")
            module, _, tensor = path.rpartition(".")
            try:
                held = getattr(model.get_submodule(module), tensor)
            except AttributeError:
                held = None
            where = int(dim) if dim.isdigit() else int(role == "consumer")
            if held is None or where >= held.ndim:
                raise ValueError(f"axis {name!r}: {text!r} is no tensor of {type(model).__name__} with such a dimension")
            cuts.append(Cut(module, tensor, where, identity(held.shape[where]), role))
    lengths = {f"{cut.name}@{cut.dim}": len(cut.index) for cut in cuts}
    if len(set(lengths.values())) != 1 or not {"producer", "consumer"} <= {cut.role for cut in cuts}:
        raise ValueError(f"axis {name!r}: producers and consumers have one length, here {lengths}")
    return Axis(name, str(given.get("kind", "channel")), len(cuts[0].index), tuple(cuts))
