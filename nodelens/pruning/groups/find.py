"""The pruning groups of any model: of known transformer blocks by the names of modules, of the rest from the exported graph."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from torch import nn

from nodelens.messages import kind_of
from nodelens.network.arguments import check_arguments
from nodelens.network.batch import Batch
from nodelens.network.eval_mode import uncompiled
from nodelens.network.groups import Frozen, GroupSlice, PruningGroup, PruningGroups, Role, identity
from nodelens.network.objective import Objective

from .adapters import adapters_in_the_way
from .families import family_groups
from .graph import graph_groups


def find_groups(model: nn.Module, batch: Any = None, extra: Sequence[PruningGroup | Mapping[str, Any]] = ()) -> PruningGroups:
    """All groups of a model and what is frozen, groups over which a norm reduces included; ``extra`` adds custom groups.

    batch: a ``Batch``, or what ``nl.analyze`` takes as one: the graph of a model, unless it consists of known transformer blocks,
    is exported with its first samples. Raises ValueError if the batch is needed and missing, if the model cannot be exported, or if
    a custom group does not fit the model.
    """
    check_arguments("nl.find_groups", model)
    model = uncompiled(model)
    found = family_groups(model)
    if not len(found) and not (extra and batch is None):
        if batch is None:
            raise ValueError(
                f"the groups of {type(model).__name__} are found from one forward pass, which needs an input: give data= or "
                "example_inputs= to nl.prune, a batch to nl.find_groups"
            )
        found = graph_groups(model, _batch(model, batch))
    elif batch is not None and _others(model, found):
        found = _with_the_rest(model, found, _batch(model, batch))
    custom = tuple(group if isinstance(group, PruningGroup) else custom_group(model, group) for group in _listed(extra))
    replaced = {group.name for group in custom}
    opt_in = tuple(g for g in found.opt_in if g.name not in replaced)
    groups = (*(g for g in found if g.name not in replaced), *custom)
    return PruningGroups(groups, (*adapters_in_the_way(model, groups), *found.frozen), opt_in)


def _listed(extra: Any) -> Any:
    """The custom groups. Raises TypeError for anything but a list of groups."""
    wrong = (
        extra if isinstance(extra, (str, Mapping)) else next((e for e in extra if not isinstance(e, (PruningGroup, Mapping))), None)
    )
    if wrong is not None:
        raise TypeError(
            f"custom_groups has {kind_of(wrong)}; it is a list of groups, as [{{'name': 'a', 'producer': ['fc1.weight'], "
            "'consumer': ['fc2.weight']}]"
        )
    return extra


def _batch(model: nn.Module, given: Any) -> Batch:
    return given if isinstance(given, Batch) else Objective.of(model).batch(given)


def _others(model: nn.Module, known: PruningGroups) -> bool:
    """Whether layers remain that the graph may group: several convolutions, or, outside models of transformers, any layers.

    The blocks of models of transformers are searched by name only, because their graphs are large.
    """
    sliced = {piece.module for group in (*known, *known.opt_in) for piece in group.slices}
    left = [m for path, m in model.named_modules() if path not in sliced and isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    if hasattr(getattr(model, "config", None), "to_dict"):
        left = [module for module in left if isinstance(module, nn.modules.conv._ConvNd)]
    return len(left) > 1


def _with_the_rest(model: nn.Module, known: PruningGroups, batch: Batch) -> PruningGroups:
    """Groups that are known by name, and those of the graph that do not overlap with them."""
    try:
        found = graph_groups(model, batch)
    except ValueError as error:
        return PruningGroups(known.groups, (*known.frozen, Frozen("the rest of the model", str(error))), known.opt_in)
    claimed = {(p.module, p.tensor, p.dim) for g in (*known, *known.opt_in) for p in g.slices}
    names = {group.name for group in known}
    more = [g for g in found if g.name not in names and claimed.isdisjoint((p.module, p.tensor, p.dim) for p in g.slices)]
    sliced = {piece.module for group in (*known, *more) for piece in group.slices}
    holders = {path.rpartition(".")[0] for path in sliced}
    unclear = [f for f in family_groups(model, rest=False).frozen if f.what not in sliced | holders]
    producers = {piece.module for group in known for piece in group.by_role("producer", "consumer")}
    reported = [f for f in found.frozen if f.what not in producers]
    return PruningGroups((*known, *more), (*unclear, *reported), known.opt_in)


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
