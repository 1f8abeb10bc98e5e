"""A plan applied without a change of shape: as gates on what consumers read, or as zeros in the tensors."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from nodelens.network.groups import GroupSlice, PruningGroup
from nodelens.network.hooks import edit
from nodelens.pruning.groups.whole_experts import unrouted

Removed = Mapping[str, Sequence[int]]


@contextmanager
def masked(model: nn.Module, groups: Iterable[PruningGroup], removed: Removed) -> Iterator[None]:
    """Inside, what consumers read of removed units is zero: {group: unit ids}. Nothing is left behind.

    A gate at every consumer's input; of experts in one tensor, which no hook sees, the columns are zero meanwhile. Whole experts
    are those that their router does without. Raises ValueError for a group or a unit that is not there, or too few experts left.
    """
    groups = list(groups)
    gates = gates_of(groups, removed)
    whole = [group for group in groups if group.router is not None and group.name in removed]
    for group in whole:
        check_min_keep(group, removed[group.name])
        del gates[group.name]
    with scaled(model, groups, gates), unrouted(model, whole, removed):
        yield


@contextmanager
def scaled(model: nn.Module, groups: Iterable[PruningGroup], gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, what consumers read of each unit is multiplied by its gate: {group: (units,)}, real numbers.

    Gates may require a gradient, but for experts in one tensor. Raises ValueError for a group that is not there, a length other
    than its units, or whole experts.
    """
    by_name = {group.name: group for group in groups}
    for name, gate in gates.items():
        check_group(by_name, name, len(gate))
        _check_weights(by_name[name])
    reads: dict[str, list[tuple[GroupSlice, Tensor]]] = {}
    for name, gate in gates.items():
        for piece in by_name[name].by_role("consumer"):
            reads.setdefault(piece.module, []).append((piece, gate))
    inside = [(piece, gate) for pairs in reads.values() for piece, gate in pairs if piece.entry is not None]
    edits: dict[nn.Module, list[tuple[GroupSlice, Tensor]]] = {}
    for path, pairs in reads.items():
        hooked = [(piece, gate) for piece, gate in pairs if piece.entry is None]
        if hooked:
            edits.setdefault(model.get_submodule(path), []).extend(hooked)
    with _multiplied(model, inside), edit({}, {m: partial(_gated, channel_dim(m), pairs) for m, pairs in edits.items()}):
        yield


def zero(model: nn.Module, groups: Iterable[PruningGroup], removed: Removed) -> None:
    """Writes zeros into every entry of a removed unit: what makes it, what reads it and what is tied to it. In place.

    Raises ValueError for a group or a unit that is not there, or whole experts.
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
    """Multiplies the columns that read each unit by its gate, in place and for good: what ``scaled`` does meanwhile."""
    by_name = {group.name: group for group in groups}
    with torch.no_grad():
        for name, gate in gates.items():
            check_group(by_name, name, len(gate))
            _check_weights(by_name[name])
            for piece in by_name[name].by_role("consumer"):
                _multiply(piece, piece.of(model), torch.as_tensor(gate))


def gates_of(groups: Iterable[PruningGroup], removed: Removed) -> dict[str, Tensor]:
    """1 where a unit stays, 0 where it goes. Raises ValueError for a group or a unit that is not there."""
    by_name = {group.name: group for group in groups}
    gates = {}
    for name, units in removed.items():
        check_group(by_name, name, None, units)
        gates[name] = torch.ones(by_name[name].n).index_fill(0, torch.tensor(list(units), dtype=torch.long), 0)
    return gates


def channel_dim(module: nn.Module) -> int:
    """The dimension of a module's input in which channels lie: 1 of convolutions, else the last."""
    return 1 if isinstance(module, nn.modules.conv._ConvNd) else -1


def check_group(by_name: Mapping[str, PruningGroup], name: str, length: int | None, units: Sequence[int] = ()) -> None:
    """Raises ValueError for a group that is not there, gates of another length, units it does not have."""
    if name not in by_name:
        raise ValueError(f"the plan names the group {name!r}; the model has {', '.join(by_name) or 'none'}")
    n = by_name[name].n
    if length is not None and length != n:
        raise ValueError(f"group {name!r} has {n} units, the gates are {length}")
    if len(units) and not 0 <= min(units) <= max(units) < n:
        raise ValueError(f"group {name!r} has {n} units, the plan removes unit {max(units) if max(units) >= n else min(units)}")


def check_min_keep(group: PruningGroup, units: Sequence[int]) -> None:
    """Raises ValueError where fewer experts stay than a router chooses for a token."""
    left = group.n - len(set(units))
    if left < group.min_keep:
        raise ValueError(
            f"group {group.name!r} would keep {left} of {group.n} experts; its router needs {group.min_keep} to choose from"
        )


def _check_weights(group: PruningGroup) -> None:
    """Raises ValueError for units that no change of weights shuts off."""
    if group.router is not None:
        raise ValueError(
            f"group {group.name!r}: a whole expert goes by its router's choice, which zeros and factors in weights do not change "
            "(it would still be sent tokens): use apply=slice in one shot, or masked() while something is measured"
        )


def _gated(dim: int, pairs: list[tuple[GroupSlice, Tensor]], x: Tensor) -> Tensor:
    gate = x.new_ones(x.shape[dim])
    for piece, values in pairs:
        places = piece.places.to(x.device)
        spread = values.to(x)[:, None].expand(places.shape).flatten()
        gate = gate.index_put((places.flatten(),), spread)
    return x * gate.reshape([-1] + [1] * (x.ndim - 1 - dim % x.ndim))


@contextmanager
def _multiplied(model: nn.Module, pairs: list[tuple[GroupSlice, Tensor]]) -> Iterator[None]:
    """Inside, an expert's columns are multiplied by gates; afterwards they are as they were, bit by bit."""
    before = [(piece, piece.of(model).clone()) for piece, _ in pairs]
    try:
        with torch.no_grad():
            for piece, gate in pairs:
                _multiply(piece, piece.of(model), gate.detach())
        yield
    finally:
        with torch.no_grad():
            for piece, old in before:
                piece.of(model).copy_(old)


def _multiply(piece: GroupSlice, tensor: Tensor, gate: Tensor) -> None:
    dim = piece.dim - (piece.entry is not None)
    whole = tensor.new_ones(tensor.shape[dim])
    whole[piece.index.flatten()] = gate.to(tensor)[:, None].expand(piece.index.shape).flatten()
    tensor.mul_(whole.reshape([-1] + [1] * (tensor.ndim - 1 - dim)))
