"""The groups of any model: by the names of its parts where these are a transformer's, else from its graph."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from torch import nn

from nodelens.network.batch import Batch
from nodelens.network.groups import GroupSlice, PruningGroup, PruningGroups, Role, identity

from .families import family_groups
from .graph import graph_groups


def find_groups(
    model: nn.Module, batch: Batch | None = None, extra: Sequence[PruningGroup | Mapping[str, Any]] = ()
) -> PruningGroups:
    """Every group of a model and what is frozen, inexact groups included; ``extra`` adds some written by hand.

    batch: a batch, from whose first samples the graph of a model without transformer blocks is read. Raises ValueError where
    that is needed and not there, the model cannot be exported, or a hand-written group does not fit.
    """
    found = family_groups(model)
    if not len(found) and not (extra and batch is None):
        if batch is None:
            raise ValueError(
                f"the groups of {type(model).__name__} are read from its graph, and that needs an input: give data= or "
                "example_inputs="
            )
        found = graph_groups(model, batch)
    written = tuple(group if isinstance(group, PruningGroup) else written_axis(model, group) for group in extra)
    named = {group.name for group in written}
    apart = tuple(a for a in found.apart if a.name not in named)
    return PruningGroups((*(a for a in found if a.name not in named), *written), found.frozen, apart)


def written_axis(model: nn.Module, given: Mapping[str, Any]) -> PruningGroup:
    """A group of {name, kind, producer: [tensors], consumer: [tensors], tied: [tensors]}, unit u at place u of each.

    A tensor is named as in the state dict, with ``@1`` behind it where another dimension than 0 (consumer: 1) is meant. Raises
    ValueError for tensors that are not there or of different lengths.
    """
    roles = get_args(Role)
    name = str(given.get("name", ""))
    if not name or set(given) - {"name", "kind", *roles}:
        raise ValueError(f"a group written by hand has a name, a kind and the tensors of {', '.join(roles)}, not {dict(given)}")
    slices = []
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
                raise ValueError(f"group {name!r}: {text!r} is no tensor of {type(model).__name__} with such a dimension")
            slices.append(GroupSlice(module, tensor, where, identity(held.shape[where]), role))
    lengths = {f"{piece.name}@{piece.dim}": len(piece.index) for piece in slices}
    if len(set(lengths.values())) != 1 or not {"producer", "consumer"} <= {piece.role for piece in slices}:
        raise ValueError(f"group {name!r}: producers and consumers have one length, here {lengths}")
    return PruningGroup(name, str(given.get("kind", "channel")), len(slices[0].index), tuple(slices))
