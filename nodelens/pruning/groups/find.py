"""The pruning groups of any model: by the names of its modules if it is a known transformer, else from its exported graph."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from torch import nn

from nodelens.network.batch import Batch
from nodelens.network.eval_mode import uncompiled
from nodelens.network.groups import GroupSlice, PruningGroup, PruningGroups, Role, identity
from nodelens.network.objective import Objective

from .families import family_groups
from .graph import graph_groups


def find_groups(model: nn.Module, batch: Any = None, extra: Sequence[PruningGroup | Mapping[str, Any]] = ()) -> PruningGroups:
    """All groups of a model and what is frozen, groups over which a norm reduces included; ``extra`` adds custom groups.

    batch: a ``Batch``, or what ``nl.analyze`` takes as one: the graph of a model without transformer blocks is exported with its
    first samples. Raises ValueError if the batch is needed and missing, if the model cannot be exported, or if a custom group does
    not fit the model.
    """
    model = uncompiled(model)
    found = family_groups(model)
    if not len(found) and not (extra and batch is None):
        if batch is None:
            raise ValueError(
                f"the groups of {type(model).__name__} are read from its exported graph, which needs an input: give data= or "
                "example_inputs= to nl.prune, a batch to nl.find_groups"
            )
        found = graph_groups(model, batch if isinstance(batch, Batch) else Objective.of(model).batch(batch))
    custom = tuple(group if isinstance(group, PruningGroup) else custom_group(model, group) for group in extra)
    replaced = {group.name for group in custom}
    opt_in = tuple(g for g in found.opt_in if g.name not in replaced)
    return PruningGroups((*(g for g in found if g.name not in replaced), *custom), found.frozen, opt_in)


def custom_group(model: nn.Module, given: Mapping[str, Any]) -> PruningGroup:
    """A group from {name, kind, producer: [tensors], consumer: [tensors], tied: [tensors]}; unit u is entry u of each tensor.

    Tensors are named as in the state dict. Units lie along dimension 0 (consumer: 1); ``@1`` after the name says otherwise.
    Raises ValueError for tensors that do not exist or differ in length.
    """
    roles = get_args(Role)
    name = str(given.get("name", ""))
    if not name or set(given) - {"name", "kind", *roles}:
        raise ValueError(f"a custom group has the keys name, kind, {', '.join(roles)}, not {dict(given)}")
    slices = []
    for role in roles:
        for text in given.get(role) or ():
            path, _, dim = str(text).partition("@")
            module, _, tensor = path.rpartition(".")
            try:
                value = getattr(model.get_submodule(module), tensor)
            except AttributeError:
                value = None
            axis = int(dim) if dim.isdigit() else int(role == "consumer")
            if value is None or axis >= value.ndim:
                raise ValueError(f"group {name!r}: {type(model).__name__} has no tensor {text!r} with that dimension")
            slices.append(GroupSlice(module, tensor, axis, identity(value.shape[axis]), role))
    lengths = {f"{piece.name}@{piece.dim}": len(piece.index) for piece in slices}
    if len(set(lengths.values())) != 1 or not {"producer", "consumer"} <= {piece.role for piece in slices}:
        raise ValueError(f"group {name!r} needs producers and consumers, all of the same length, not {lengths}")
    return PruningGroup(name, str(given.get("kind", "channel")), len(slices[0].index), tuple(slices))
