"""Reductions over processes, of statistics only: metrics are computed after the reduction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import Accumulator, ClassStatistic, Statistic

_BUCKET = 1 << 26  # bytes of an all-reduce


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gathered(value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks. Collective."""
    if world()[1] == 1:
        return [value]
    every: list[Any] = [None] * world()[1]
    dist.all_gather_object(every, value)
    return every


def first_of(value: Any) -> Any:
    """The value of the first process whose value is not None, for processes without data. Collective."""
    return next((v for v in gathered(value) if v is not None), None)


def reduce_tensor(tensor: Tensor, largest: bool = False) -> Tensor:
    """The sum, or the elementwise maximum, of a tensor over processes. Collective."""
    if world()[1] > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return tensor


def reduce_tensors(tensors: Sequence[Tensor], largest: bool = False) -> list[Tensor]:
    """The sums, or the elementwise maxima, of many tensors over processes, in a few all-reduces of up to 64 MB each. Collective."""
    done: list[Tensor] = list(tensors)
    if world()[1] == 1:
        return done
    for bucket in _buckets(tensors):
        flat = torch.cat([tensors[k].reshape(-1) for k in bucket])
        dist.all_reduce(flat, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        for k, piece in zip(bucket, flat.split([tensors[k].numel() for k in bucket]), strict=True):
            done[k] = piece.view(tensors[k].shape).clone()
    return done


def _buckets(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of tensors of one dtype whose bytes together fit into a bucket; a larger tensor has one of its own."""
    buckets: list[list[int]] = []
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        used = _BUCKET + 1
        for k, tensor in enumerate(tensors):
            if tensor.dtype == dtype:
                if used + tensor.nbytes > _BUCKET:
                    buckets.append([])
                    used = 0
                buckets[-1].append(k)
                used += tensor.nbytes
    return buckets


@dataclass(frozen=True)
class Traffic:
    """Bytes of the sums of a process, and bytes that it sends to add them to those of the others.

    A ring all-reduce of b bytes over N processes sends 2 (N - 1) / N b from each (Patarasuk and Yuan, 2009, J. Parallel Distrib.
    Comput. 69, 117-124): less than twice the sums. Samples of rows, which are merged and not added, are sent to every process.
    """

    sums: int = 0
    sent: int = 0

    @classmethod
    def of(cls, reduced: int, gathered: int = 0) -> "Traffic":
        """Of sums that are added by an all-reduce, and of those that every other process gets."""
        ranks = world()[1]
        return cls(reduced + gathered, round(2 * (ranks - 1) / ranks * reduced) + (ranks - 1) * gathered)


def reduce_sums(sums: Mapping[Any, Accumulator], device: torch.device) -> Traffic:
    """Replace every accumulator by its sum over processes, in place; a process without rows adds nothing. Collective.

    All sums go through the same few all-reduces, after one that agrees on their shifts.
    """
    if world()[1] == 1:
        return Traffic.of(sum(accumulator.nbytes for accumulator in sums.values()))
    added = [a for a in sums.values() if not a.statistic.merged]
    forms = [[part and {k: (tuple(t.shape), t.dtype) for k, t in part.tensors().items()} for part in a.parts] for a in added]
    every = gathered(forms)
    places, parts = [], []
    for number, accumulator in enumerate(added):
        for group, part in enumerate(accumulator.parts):
            known = [form[number][group] for form in every if form[number][group] is not None]
            if known:
                whole = max(known, key=lambda form: form["n"][0])  # processes may have seen different numbers of classes
                places.append((accumulator, group))
                parts.append(_prepared(accumulator.statistic, part, whole, device))
                accumulator.parts[group] = part = None  # the memory of sums that are moved to another shift is free then
    _move_to_common_shifts(parts)
    fields = [(k, name) for k, part in enumerate(parts) for name in part.names() if name not in part.shifts]
    values: dict[tuple[int, str], Tensor] = {}
    for largest in (False, True):
        chosen = [(k, name) for k, name in fields if (name in parts[k].maxima) == largest]
        values |= zip(chosen, reduce_tensors([getattr(parts[k], name) for k, name in chosen], largest), strict=True)
    for k, ((accumulator, group), part) in enumerate(zip(places, parts, strict=True)):
        own = {name: t for name, t in part.tensors().items() if name in part.shifts}
        accumulator.parts[group] = type(part)(**own, **{name: values[k, name] for name in part.names() if name not in own})
    reduced = sum(part.nbytes for part in parts)
    merged = [a for a in sums.values() if a.statistic.merged]
    sent = sum(a.nbytes for a in merged)
    for accumulator in merged:
        _merge(accumulator, device)
    return Traffic.of(reduced, sent)


def _prepared(statistic: type[Statistic], part: Statistic | None, form: dict[str, tuple], device: torch.device) -> Statistic:
    """The part of this process in the common form: zeros where it has none."""
    if part is None:
        part = statistic(**{k: torch.zeros(shape, dtype=dtype, device=device) for k, (shape, dtype) in form.items()})
    return part.widen(form["n"][0][0]) if isinstance(part, ClassStatistic) else part


def _move_to_common_shifts(parts: list[Statistic]) -> None:
    """Replaces parts by those about common shifts: means of the shifts of all processes, weighted by rows. Collective."""
    shifted = [k for k, part in enumerate(parts) if part.shifts]
    rows = {k: parts[k].tensors()["n"].sum().double() for k in shifted}
    names = [(k, name) for k in shifted for name in parts[k].shifts]
    weighted = [parts[k].tensors()[name].double() * rows[k] for k, name in names]
    summed = reduce_tensors([*(rows[k][None] for k in shifted), *weighted])
    totals = {k: total.clamp_min(1) for k, total in zip(shifted, summed[: len(shifted)], strict=True)}
    about: dict[int, dict[str, Tensor]] = {k: {} for k in shifted}
    for (k, name), value in zip(names, summed[len(shifted) :], strict=True):
        about[k][name] = (value / totals[k]).to(parts[k].tensors()[name].dtype)
    for k, shifts in about.items():
        parts[k] = parts[k].about(**shifts)


def _merge(accumulator: Accumulator, device: torch.device) -> None:
    """Add the parts of all processes, in the order of their ranks."""
    parts = [part and {k: t.cpu() for k, t in part.tensors().items()} for part in accumulator.parts]
    every = gathered(parts)
    accumulator.parts = [None] * len(parts)
    for held in every:
        for group, tensors in enumerate(held):
            if tensors is not None:
                accumulator.add(accumulator.statistic(**tensors), group)
    accumulator.to(device)
