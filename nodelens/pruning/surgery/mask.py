"""Masking: removing units without changing shapes, by gates at the inputs of consumers or by zeros in the tensors."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nodelens.interventions.applying import applied
from nodelens.interventions.edit_value import Edit
from nodelens.interventions.expert_gates import multiply
from nodelens.network.groups import PruningGroup
from nodelens.pruning.groups.whole_experts import unrouted

Removed = Mapping[str, Sequence[int]]


@contextmanager
def masked(model: nn.Module, groups: Iterable[PruningGroup], removed: Removed) -> Iterator[None]:
    """Inside the context, consumers read zeros for removed units: {group: unit ids}. The model is restored on exit.

    A hook gates the input of every consumer. For experts in one tensor, which cannot be hooked, the columns are set to zero.
    Whole experts are never chosen by their router. Raises ValueError for an unknown group or unit, or if too few experts stay.
    """
    groups = list(groups)
    by_name = {group.name: group for group in groups}
    for name, units in removed.items():
        check_group(by_name, name, None, units)
    whole = [group for group in groups if group.router is not None and group.name in removed]
    for group in whole:
        check_min_keep(group, removed[group.name])
    routed = {group.name for group in whole}
    edits = [Edit(name, "zero", units=units) for name, units in removed.items() if len(units) and name not in routed]
    with applied(model, edits, groups), unrouted(model, whole, removed):
        yield


@contextmanager
def scaled(model: nn.Module, groups: Iterable[PruningGroup], gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the context, consumers read each unit multiplied by its gate: {group: (units,)}, real numbers.

    Gates may require gradients, except for experts in one tensor. Raises ValueError for an unknown group, a number of gates that
    differs from its number of units, or whole experts.
    """
    groups = list(groups)
    by_name = {group.name: group for group in groups}
    for name, gate in gates.items():
        check_group(by_name, name, len(gate))
        _check_weights(by_name[name])
    with applied(model, [Edit(name, "scale", value=gate) for name, gate in gates.items()], groups):
        yield


def zero(model: nn.Module, groups: Iterable[PruningGroup], removed: Removed) -> None:
    """Sets every entry of removed units to zero, in place: in producers, consumers and tied tensors.

    Raises ValueError for an unknown group or unit, or whole experts.
    """
    by_name = {group.name: group for group in groups}
    with torch.no_grad():
        for name, units in removed.items():
            check_group(by_name, name, None, units)
            _check_weights(by_name[name])
            for piece in by_name[name].slices:
                tensor = piece.of(model)
                places = piece.index[list(units)].flatten().to(tensor.device)
                tensor.index_fill_(piece.dim - (piece.entry is not None), places, 0)


def scale(model: nn.Module, groups: Iterable[PruningGroup], gates: Mapping[str, Sequence[float] | Tensor]) -> None:
    """Multiplies the consumer's columns of each unit by its gate, in place; ``scaled`` does the same temporarily."""
    by_name = {group.name: group for group in groups}
    with torch.no_grad():
        for name, gate in gates.items():
            check_group(by_name, name, len(gate))
            _check_weights(by_name[name])
            for piece in by_name[name].by_role("consumer"):
                multiply(piece, piece.of(model), torch.as_tensor(gate))


def gates_of(groups: Iterable[PruningGroup], removed: Removed) -> dict[str, Tensor]:
    """{group: (units,)}, 1 for kept and 0 for removed units. Raises ValueError for an unknown group or unit."""
    by_name = {group.name: group for group in groups}
    gates = {}
    for name, units in removed.items():
        check_group(by_name, name, None, units)
        gates[name] = torch.ones(by_name[name].n).index_fill(0, torch.tensor(list(units), dtype=torch.long), 0)
    return gates


def channel_dim(module: nn.Module) -> int:
    """The channel dimension of a module's input: 1 for convolutions, else the last."""
    return 1 if isinstance(module, nn.modules.conv._ConvNd) else -1


def check_group(by_name: Mapping[str, PruningGroup], name: str, length: int | None, units: Sequence[int] = ()) -> None:
    """Raises ValueError for an unknown group, a wrong number of gates, or units that the group does not have."""
    if name not in by_name:
        raise ValueError(f"the plan names the group {name!r}; the model has {', '.join(by_name) or 'none'}")
    n = by_name[name].n
    if length is not None and length != n:
        raise ValueError(f"group {name!r} has {n} units, there are {length} gates: give one gate per unit")
    if len(units) and not 0 <= min(units) <= max(units) < n:
        raise ValueError(f"group {name!r} has {n} units, the plan removes unit {max(units) if max(units) >= n else min(units)}")


def check_min_keep(group: PruningGroup, units: Sequence[int]) -> None:
    """Raises ValueError if fewer experts stay than the router chooses per token."""
    kept = group.n - len(set(units))
    if kept < group.min_keep:
        raise ValueError(
            f"group {group.name!r} would keep {kept} of {group.n} experts; its router needs {group.min_keep} to choose from"
        )


def _check_weights(group: PruningGroup) -> None:
    """Raises ValueError for whole experts, which a change of weights cannot switch off."""
    if group.router is not None:
        raise ValueError(
            f"group {group.name!r}: zeros or gates in the weights of a whole expert do not change the router, which would still "
            "send it tokens: use apply=slice with schedule=one_shot, or masked() to measure without it"
        )
