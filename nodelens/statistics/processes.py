"""Reductions over processes, of statistics only: metrics are computed after the reduction."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import Accumulator, ClassStatistic, Statistic


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


def reduce_sums(sums: Mapping[Any, Accumulator], device: torch.device) -> None:
    """Replace every accumulator by its sum over processes, in place; a process without rows adds nothing. Collective."""
    if world()[1] == 1:
        return
    for accumulator in sums.values():
        if accumulator.statistic.merged:
            _merge(accumulator, device)
            continue
        forms = [part and {k: (tuple(t.shape), t.dtype) for k, t in part.tensors().items()} for part in accumulator.parts]
        every = gathered(forms)
        for group, part in enumerate(accumulator.parts):
            known = [form[group] for form in every if form[group] is not None]
            if known:
                whole = max(known, key=lambda form: form["n"][0])  # processes may have seen different numbers of classes
                accumulator.parts[group] = _reduce(accumulator.statistic, part, whole, device)


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


def _reduce(statistic: type[Statistic], part: Statistic | None, form: dict[str, tuple], device: torch.device) -> Statistic:
    if part is None:
        part = statistic(**{k: torch.zeros(shape, dtype=dtype, device=device) for k, (shape, dtype) in form.items()})
    if isinstance(part, ClassStatistic):
        part = part.widen(form["n"][0][0])
    part = part.about(**_common_shift(part)) if part.shifts else part
    held = part.tensors().items()
    return statistic(**{k: t if k in part.shifts else reduce_tensor(t.contiguous(), k in part.maxima) for k, t in held})


def _common_shift(part: Statistic) -> dict[str, Tensor]:
    """A common shift: the mean of the shifts of all processes, weighted by rows. Collective."""
    n = part.tensors()["n"].sum().double()
    total = reduce_tensor(n).clamp_min(1)
    return {name: reduce_tensor(part.tensors()[name] * n) / total for name in part.shifts}
