"""A network loses units: scored, allocated, chosen, removed, made up for, finetuned."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import pandas as pd
from torch import nn

from nodelens.network.batch import Batch
from nodelens.network.groups import PruningGroup, PruningGroups
from nodelens.network.targets import summed_loss
from nodelens.pruning.allocation.allocate import Allocation
from nodelens.pruning.allocation.selection import Mode
from nodelens.pruning.criteria.criterion import Criterion, Spec
from nodelens.pruning.criteria.scoring import Reduce
from nodelens.pruning.surgery.compensate import Compensate, compensate_units, renew_batch_norm
from nodelens.pruning.surgery.mask import Removed, gates_of, scale, zero
from nodelens.pruning.surgery.save import origin_of, save_pruned, structure
from nodelens.pruning.surgery.slice import patched, slice_units

from .context import PruningContext
from .cost import Budget
from .planning import PruningOptions, Schedule, plan_removal
from .removal_plan import RemovalPlan

Apply = Literal["slice", "mask", "scale"]


class FineTuning(Protocol):
    """What is done after units went: it trains the model in place, and keeps what is removed at zero."""

    def __call__(self, model: nn.Module, zeros: Callable[[nn.Module], None]) -> Mapping[str, Any]: ...


@dataclass
class Pruned:
    """A model that lost units, the plan, the scores it rests on, and how it was done."""

    model: nn.Module
    plan: RemovalPlan
    table: pd.DataFrame
    groups: PruningGroups
    apply: Apply = "slice"
    origin: Mapping[str, Any] = field(default_factory=dict)  # what the dense model is built from
    dense: Mapping[str, Any] = field(default_factory=dict)  # the dense model's tensors
    numbers: Mapping[str, Any] = field(default_factory=dict)  # that modules keep beside their tensors
    finetuned: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> Path:
        """Writes weights and plan, so that ``load_pruned`` makes the model again: smaller, or, of a mask, with its zeros."""
        return save_pruned(self, Path(folder))


def carry_out(
    context: PruningContext,
    options: PruningOptions,
    table: pd.DataFrame | None = None,
    apply: Apply = "slice",
    finetune: FineTuning | None = None,
    gate: float = 0.0,
) -> Pruned:
    """Prunes a copy of the context's model. table: scores that are there already; later steps of a schedule measure their own."""
    model = copy.deepcopy(context.model)
    now = replace(context, model=model)
    removed: Removed = {}
    finetuned: Mapping[str, Any] = {}
    grown: set[str] = set()
    shares = options.schedule.shares(options.amount)
    for step, share in enumerate(shares, 1):
        if table is None or step > 1:
            table = now.table([options.criterion])
        plan = plan_removal(now, table, options, share, removed)
        measured = context if step == 1 else now  # the dense model's moments serve every cell of a sweep
        grown |= _made_up_for(measured, model, plan.removed, removed, options)
        removed, how = plan.removed, apply if step == len(shares) else "mask"
        numbers = _applied(model, now.groups, removed, how, gate)
        if options.compensate == "batch_norm":
            renew_batch_norm(model, context.every_batch)
        if finetune is not None:
            finetuned = finetune(model, partial(zero, groups=now.groups, removed=removed if how == "mask" else {}))
        now = replace(now, _moments={})
    about = {**plan.about, "added_bias": sorted(grown), "dense_fingerprint": context.fingerprint}
    plan = RemovalPlan(removed, about)
    dense = structure(context.model)
    return Pruned(model, plan, table, now.groups, apply, origin_of(context.model), dense, numbers, finetuned)


def _made_up_for(
    measured: PruningContext, model: nn.Module, removed: Removed, before: Removed, options: PruningOptions
) -> set[str]:
    """Compensates for what has gone since ``before``; returns the modules that were given a bias."""
    if options.compensate not in ("bias", "least_squares"):
        return set()
    fresh = {name: sorted({*units} - {*before.get(name, ())}) for name, units in removed.items()}
    moments = measured.moments(options.compensate == "least_squares")
    return set(compensate_units(model, measured.groups, fresh, moments, options.compensate, measured.norms()))


def _applied(model: nn.Module, groups: PruningGroups, removed: Removed, apply: Apply, gate: float) -> Mapping[str, Any]:
    """Takes units away, in place; the numbers that modules keep beside their tensors and that a slice changed."""
    if apply == "slice":
        numbers = patched(model, groups, removed)
        slice_units(model, groups, removed)
        return numbers
    if apply == "scale":
        scale(model, groups, {k: 1 - (1 - gate) * (1 - v) for k, v in gates_of(groups, removed).items()})
    else:
        zero(model, groups, removed)
    return {}


def prune(
    model: nn.Module,
    criterion: Spec = "taylor",
    amount: float = 0.5,
    *,
    data: Iterable[Any] | None = None,
    example_inputs: Any = None,
    scope: str | Sequence[str] = "*",
    freeze: str | Sequence[str] = (),
    protect: Mapping[str, Sequence[int]] | None = None,
    custom_groups: Sequence[PruningGroup | Mapping[str, Any]] = (),
    allow_approximate: bool = False,
    allocation: str | Allocation = "uniform",
    budget: Budget = "units",
    mode: Mode = "low",
    apply: Apply = "slice",
    gate: float = 0.0,
    compensate: Compensate = "none",
    schedule: str | Schedule = "one_shot",
    finetune: FineTuning | None = None,
    reduce: Reduce = "sum",
    seed: int = 0,
    loss: Any = summed_loss,
    **options: Any,
) -> Pruned:
    """A copy of a model without the units that a criterion ranks lowest.

    criterion: a published criterion's or a metric's name, {name: signed weight}, or the long form of ``Criterion``. amount: the
    share of the budget (units, params or macs) to remove. data: calibration batches as ``nl.analyze`` takes them, a loader or a
    list that can be read again; criteria of weights need none. example_inputs: one batch, where there are no data. scope: groups
    by name, pattern or kind (ffn, head, kv_group, channel, moe_ffn; expert, whole ones, which ``*`` leaves out); freeze: groups
    that stay whole; protect: {group: units that stay}. allocation: uniform, global, erk, lamp, isomorphic, or an ``Allocation``
    with its options. mode: low, high or random.
    apply: slice (smaller tensors), mask (zeros), scale (removed units times ``gate``). compensate: none, bias, least_squares,
    batch_norm. schedule: one_shot, or an iterative ``Schedule``. finetune: a callable such as ``Finetune``. options go to
    ``nl.analyze``. Raises ValueError for what does not fit; the model itself is never changed.
    """
    if data is not None and iter(data) is data:
        raise ValueError("data can be read only once: give a loader or a list; graph, scores and moments each read it")
    if apply not in ("slice", "mask", "scale"):
        raise ValueError(f"apply is {apply!r}; it is slice, mask or scale")
    asked = PruningOptions(
        Criterion.of(criterion),
        amount,
        Allocation(allocation) if isinstance(allocation, str) else allocation,  # type: ignore[arg-type]
        budget,
        mode,
        compensate,
        Schedule() if schedule == "one_shot" else schedule,  # type: ignore[arg-type]
        seed,
        protect or {},
    )
    batch = example_inputs if example_inputs is not None else None if data is None else next(iter(data), None)
    batch = None if batch is None else Batch.of(batch, seed=seed)
    context = PruningContext.of(
        model,
        batch,
        data,
        scope=scope,
        freeze=freeze,
        allow_approximate=allow_approximate,
        custom_groups=custom_groups,
        seed=seed,
        reduce=reduce,
        loss=loss,
        options=options,
    )
    return carry_out(context, asked, None, apply, finetune, gate)
