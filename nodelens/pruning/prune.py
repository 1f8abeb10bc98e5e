"""A network loses units: scored, allocated, chosen, removed, made up for, recovered."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import pandas as pd
from torch import nn

from ..frame import Frame
from ..targets import summed_loss
from .allocation import Allocation
from .apply import Removed, gates_of, scale, zero
from .artefact import origin_of, save_pruned, structure
from .axis import Axes, Axis
from .compensate import Compensate, compensate_units, renew_batch_norm
from .cost import Budget
from .criteria import Criterion, Spec
from .planning import Recipe, Schedule, plan_removal
from .removal import RemovalPlan
from .scoring import Reduce
from .selection import Mode
from .slicing import patched, slice_units
from .subject import Subject

Apply = Literal["slice", "mask", "scale"]


class Recover(Protocol):
    """What is done after units went: it trains the model in place, and keeps what is removed at zero."""

    def __call__(self, model: nn.Module, zeros: Callable[[nn.Module], None]) -> Mapping[str, Any]: ...


@dataclass
class Pruned:
    """A model that lost units, the plan, the scores it rests on, and how it was done."""

    model: nn.Module
    plan: RemovalPlan
    table: pd.DataFrame
    axes: Axes
    apply: Apply = "slice"
    origin: Mapping[str, Any] = field(default_factory=dict)  # what the dense model is built from
    dense: Mapping[str, Any] = field(default_factory=dict)  # the dense model's tensors
    numbers: Mapping[str, Any] = field(default_factory=dict)  # that modules keep beside their tensors
    recovered: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> Path:
        """Writes weights and plan, so that ``load_pruned`` makes the model again: smaller, or, of a mask, with its zeros."""
        return save_pruned(self, Path(folder))


def carry_out(
    subject: Subject,
    recipe: Recipe,
    table: pd.DataFrame | None = None,
    apply: Apply = "slice",
    recover: Recover | None = None,
    gate: float = 0.0,
) -> Pruned:
    """Prunes a copy of the subject's model. table: scores that are there already; later steps of a schedule measure their own."""
    model = copy.deepcopy(subject.model)
    now = replace(subject, model=model)
    removed: Removed = {}
    recovered: Mapping[str, Any] = {}
    grown: set[str] = set()
    shares = recipe.schedule.shares(recipe.amount)
    for step, share in enumerate(shares, 1):
        if table is None or step > 1:
            table = now.table([recipe.criterion])
        plan = plan_removal(now, table, recipe, share, removed)
        measured = subject if step == 1 else now  # the dense model's moments serve every cell of a sweep
        grown |= _made_up_for(measured, model, plan.removed, removed, recipe)
        removed, how = plan.removed, apply if step == len(shares) else "mask"
        numbers = _applied(model, now.axes, removed, how, gate)
        if recipe.compensate == "batch_norm":
            renew_batch_norm(model, subject.every_batch)
        if recover is not None:
            recovered = recover(model, partial(zero, axes=now.axes, removed=removed if how == "mask" else {}))
        now = replace(now, _moments={})
    about = {**plan.about, "added_bias": sorted(grown), "dense_fingerprint": subject.fingerprint}
    plan = RemovalPlan(removed, about)
    dense = structure(subject.model)
    return Pruned(model, plan, table, now.axes, apply, origin_of(subject.model), dense, numbers, recovered)


def _made_up_for(measured: Subject, model: nn.Module, removed: Removed, before: Removed, recipe: Recipe) -> set[str]:
    """Compensates for what has gone since ``before``; returns the modules that were given a bias."""
    if recipe.compensate not in ("bias", "least_squares"):
        return set()
    fresh = {name: sorted({*units} - {*before.get(name, ())}) for name, units in removed.items()}
    moments = measured.moments(recipe.compensate == "least_squares")
    return set(compensate_units(model, measured.axes, fresh, moments, recipe.compensate, measured.norms()))


def _applied(model: nn.Module, axes: Axes, removed: Removed, apply: Apply, gate: float) -> Mapping[str, Any]:
    """Takes units away, in place; the numbers that modules keep beside their tensors and that a slice changed."""
    if apply == "slice":
        numbers = patched(model, axes, removed)
        slice_units(model, axes, removed)
        return numbers
    if apply == "scale":
        scale(model, axes, {k: 1 - (1 - gate) * (1 - v) for k, v in gates_of(axes, removed).items()})
    else:
        zero(model, axes, removed)
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
    axes: Sequence[Axis | Mapping[str, Any]] = (),
    inexact: bool = False,
    allocation: str | Allocation = "uniform",
    budget: Budget = "units",
    mode: Mode = "low",
    apply: Apply = "slice",
    gate: float = 0.0,
    compensate: Compensate = "none",
    schedule: str | Schedule = "one_shot",
    recover: Recover | None = None,
    reduce: Reduce = "sum",
    seed: int = 0,
    loss: Any = summed_loss,
    **options: Any,
) -> Pruned:
    """A copy of a model without the units that a criterion ranks lowest.

    criterion: a published criterion's or a metric's name, {name: signed weight}, or the long form of ``Criterion``. amount: the
    share of the budget (units, params or macs) to remove. data: calibration batches as ``nl.analyze`` takes them, a loader or a
    list that can be read again; criteria of weights need none. example_inputs: one batch, where there are no data. scope: axes
    by name, pattern or kind (ffn, head, kv_group, channel, moe_ffn; expert, whole ones, which ``*`` leaves out); freeze: axes
    that stay whole; protect: {axis: units that stay}. allocation: uniform, global, erk, lamp, isomorphic, or an ``Allocation``
    with its options. mode: low, high or random.
    apply: slice (smaller tensors), mask (zeros), scale (removed units times ``gate``). compensate: none, bias, least_squares,
    batch_norm. schedule: one_shot, or an iterative ``Schedule``. recover: a callable such as ``Finetune``. options go to
    ``nl.analyze``. Raises ValueError for what does not fit; the model itself is never changed.
    """
    if data is not None and iter(data) is data:  # type: ignore[call-overload]
        raise ValueError("data can be read only once: give a loader or a list; graph, scores and moments each read it")
    if apply not in ("slice", "mask", "scale"):
        raise ValueError(f"apply is {apply!r}; it is slice, mask or scale")
    recipe = Recipe(
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
    frame = None if batch is None else Frame.of(batch, seed=seed)
    subject = Subject.of(
        model,
        frame,
        data,
        scope=scope,
        freeze=freeze,
        inexact=inexact,
        axes=axes,
        seed=seed,
        reduce=reduce,
        loss=loss,
        options=options,
    )
    return carry_out(subject, recipe, None, apply, recover, gate)
