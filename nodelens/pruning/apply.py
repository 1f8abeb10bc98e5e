"""A plan applied without a change of shape: as gates on what consumers read, or as zeros in the tensors."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..hooks import edit
from .axis import Axis, Cut
from .routing import unrouted

Removed = Mapping[str, Sequence[int]]


@contextmanager
def masked(model: nn.Module, axes: Iterable[Axis], removed: Removed) -> Iterator[None]:
    """Inside, what consumers read of removed units is zero: {axis: unit ids}. Nothing is left behind.

    A gate at every consumer's input; of experts in one tensor, which no hook sees, the columns are zero meanwhile. Whole experts
    are those that their router does without. Raises ValueError for an axis or a unit that is not there, or too few experts left.
    """
    axes = list(axes)
    gates = gates_of(axes, removed)
    whole = [axis for axis in axes if axis.router is not None and axis.name in removed]
    for axis in whole:
        check_least(axis, removed[axis.name])
        del gates[axis.name]
    with scaled(model, axes, gates), unrouted(model, whole, removed):
        yield


@contextmanager
def scaled(model: nn.Module, axes: Iterable[Axis], gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, what consumers read of each unit is multiplied by its gate: {axis: (units,)}, real numbers.

    Gates may require a gradient, but for experts in one tensor. Raises ValueError for an axis that is not there, a length other
    than its units, or whole experts.
    """
    by_name = {axis.name: axis for axis in axes}
    for name, gate in gates.items():
        check_axis(by_name, name, len(gate))
        _check_weights(by_name[name])
    reads: dict[str, list[tuple[Cut, Tensor]]] = {}
    for name, gate in gates.items():
        for cut in by_name[name].by_role("consumer"):
            reads.setdefault(cut.module, []).append((cut, gate))
    inside = [(cut, gate) for pairs in reads.values() for cut, gate in pairs if cut.entry is not None]
    edits: dict[nn.Module, list[tuple[Cut, Tensor]]] = {}
    for path, pairs in reads.items():
        hooked = [(cut, gate) for cut, gate in pairs if cut.entry is None]
        if hooked:
            edits.setdefault(model.get_submodule(path), []).extend(hooked)
    with _multiplied(model, inside), edit({}, {m: partial(_gated, channel_axis(m), pairs) for m, pairs in edits.items()}):
        yield


def zero(model: nn.Module, axes: Iterable[Axis], removed: Removed) -> None:
    """Writes zeros into every entry of a removed unit: what makes it, what reads it and what is tied to it. In place.

    Raises ValueError for an axis or a unit that is not there, or whole experts.
    """
    by_name = {axis.name: axis for axis in axes}
    with torch.no_grad():
        for name, units in removed.items():
            check_axis(by_name, name, None, units)
            _check_weights(by_name[name])
            for cut in by_name[name].cuts:
                tensor = cut.of(model)
                places = cut.index[list(units)].flatten().to(tensor.device)
                tensor.index_fill_(cut.dim - (cut.entry is not None), places, 0)


def scale(model: nn.Module, axes: Iterable[Axis], gates: Mapping[str, Sequence[float] | Tensor]) -> None:
    """Multiplies the columns that read each unit by its gate, in place and for good: what ``scaled`` does meanwhile."""
    by_name = {axis.name: axis for axis in axes}
    with torch.no_grad():
        for name, gate in gates.items():
            check_axis(by_name, name, len(gate))
            _check_weights(by_name[name])
            for cut in by_name[name].by_role("consumer"):
                _multiply(cut, cut.of(model), torch.as_tensor(gate))


def gates_of(axes: Iterable[Axis], removed: Removed) -> dict[str, Tensor]:
    """1 where a unit stays, 0 where it goes. Raises ValueError for an axis or a unit that is not there."""
    by_name = {axis.name: axis for axis in axes}
    gates = {}
    for name, units in removed.items():
        check_axis(by_name, name, None, units)
        gates[name] = torch.ones(by_name[name].n).index_fill(0, torch.tensor(list(units), dtype=torch.long), 0)
    return gates


def channel_axis(module: nn.Module) -> int:
    """The dimension of a module's input in which channels lie: 1 of convolutions, else the last."""
    return 1 if isinstance(module, nn.modules.conv._ConvNd) else -1


def check_axis(by_name: Mapping[str, Axis], name: str, length: int | None, units: Sequence[int] = ()) -> None:
    """Raises ValueError for an axis that is not there, gates of another length, units it does not have."""
    if name not in by_name:
        raise ValueError(f"the plan names the axis {name!r}; the model has {', '.join(by_name) or 'none'}")
    n = by_name[name].n
    if length is not None and length != n:
        raise ValueError(f"axis {name!r} has {n} units, the gates are {length}")
    if len(units) and not 0 <= min(units) <= max(units) < n:
        raise ValueError(f"axis {name!r} has {n} units, the plan removes unit {max(units) if max(units) >= n else min(units)}")


def check_least(axis: Axis, units: Sequence[int]) -> None:
    """Raises ValueError where fewer experts stay than a router chooses for a token."""
    left = axis.n - len(set(units))
    if left < axis.least:
        raise ValueError(f"axis {axis.name!r} would keep {left} of {axis.n} experts; its router needs {axis.least} to choose from")


def _check_weights(axis: Axis) -> None:
    """Raises ValueError for units that no change of weights shuts off."""
    if axis.router is not None:
        raise ValueError(
            f"axis {axis.name!r}: a whole expert goes by its router's choice, which zeros and factors in weights do not change (it "
            "would still be sent tokens): use apply=slice in one shot, or masked() while something is measured"
        )


def _gated(axis: int, pairs: list[tuple[Cut, Tensor]], x: Tensor) -> Tensor:
    gate = x.new_ones(x.shape[axis])
    for cut, values in pairs:
        places = cut.places.to(x.device)
        spread = values.to(x)[:, None].expand(places.shape).flatten()
        gate = gate.index_put((places.flatten(),), spread)
    return x * gate.reshape([-1] + [1] * (x.ndim - 1 - axis % x.ndim))


@contextmanager
def _multiplied(model: nn.Module, pairs: list[tuple[Cut, Tensor]]) -> Iterator[None]:
    """Inside, an expert's columns are multiplied by gates; afterwards they are as they were, bit by bit."""
    before = [(cut, cut.of(model).clone()) for cut, _ in pairs]
    try:
        with torch.no_grad():
            for cut, gate in pairs:
                _multiply(cut, cut.of(model), gate.detach())
        yield
    finally:
        with torch.no_grad():
            for cut, old in before:
                cut.of(model).copy_(old)


def _multiply(cut: Cut, tensor: Tensor, gate: Tensor) -> None:
    dim = cut.dim - (cut.entry is not None)
    whole = tensor.new_ones(tensor.shape[dim])
    whole[cut.index.flatten()] = gate.to(tensor)[:, None].expand(cut.index.shape).flatten()
    tensor.mul_(whole.reshape([-1] + [1] * (tensor.ndim - 1 - dim)))
