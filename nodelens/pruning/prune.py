"""Prune a network: score its units, allocate a budget, select and remove units, compensate, fine-tune."""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import pandas as pd
from torch import nn

from nodelens.engine.options import AnalyzeOptions, check_names
from nodelens.network.batch import Batch
from nodelens.network.groups import PruningGroup, PruningGroups
from nodelens.network.targets import summed_loss
from nodelens.pruning.allocation.allocate import Allocation
from nodelens.pruning.allocation.selection import Mode
from nodelens.pruning.criteria.criterion import Criterion, Spec
from nodelens.pruning.criteria.scoring import Reduce
from nodelens.pruning.surgery.compensate import Compensate, compensate_units, reestimate_batch_norm
from nodelens.pruning.surgery.mask import Removed, gates_of, scale, zero
from nodelens.pruning.surgery.save import origin_of, save_pruned, structure
from nodelens.pruning.surgery.slice import slice_units, updated_counts

from .context import PruningContext
from .cost import Budget
from .planning import PruningOptions, Schedule, plan_removal
from .removal_plan import RemovalPlan

Apply = Literal["slice", "mask", "scale"]
_SIZES = {"params": "parameters", "macs": "multiply-accumulate operations per sample"}


class FineTuning(Protocol):
    """Trains a pruned model in place; calls ``zeros`` so that removed units stay zero. Returns what it reports."""

    def __call__(self, model: nn.Module, zeros: Callable[[nn.Module], None]) -> Mapping[str, Any]: ...


@dataclass
class Pruned:
    """A pruned model, the removal plan, the scores behind it, and how it was pruned."""

    model: nn.Module
    plan: RemovalPlan
    table: pd.DataFrame
    groups: PruningGroups
    apply: Apply = "slice"
    origin: Mapping[str, Any] = field(default_factory=dict)  # what the dense model is built from
    dense: Mapping[str, Any] = field(default_factory=dict)  # names, dtypes and shapes of the dense model's tensors
    numbers: Mapping[str, Any] = field(default_factory=dict)  # counts that modules store, such as num_heads
    finetuned: Mapping[str, Any] = field(default_factory=dict)  # what fine-tuning reports

    def summary(self) -> str:
        """What was removed, and what is left, in two lines."""
        about, units = self.plan.about, sum(group.n for group in self.groups)
        gone = sum(map(len, self.plan.removed.values()))
        sizes = [
            f"{name}: {about[f'dense_{key}']:,} -> {about[key]:,}" for key, name in _SIZES.items() if about.get(key) is not None
        ]
        return "\n".join([f"{gone:,} of {units:,} units removed ({self.apply})", ", ".join(sizes)])

    def __repr__(self) -> str:
        return f"Pruned: {self.summary()}"

    def save(self, folder: str | Path) -> Path:
        """Writes weights and plan; ``load_pruned`` restores the model: smaller after a slice, with zeros after a mask."""
        return save_pruned(self, Path(folder))


def carry_out(
    context: PruningContext,
    options: PruningOptions,
    table: pd.DataFrame | None = None,
    apply: Apply = "slice",
    finetune: FineTuning | None = None,
    gate: float = 0.0,
) -> Pruned:
    """Prunes a copy of the context's model. table: scores for the first step; later steps of a schedule measure their own."""
    model = copy.deepcopy(context.model)
    current = replace(context, model=model)
    removed: Removed = {}
    finetuned: Mapping[str, Any] = {}
    added_bias: set[str] = set()
    shares = options.schedule.shares(options.amount)
    for step, share in enumerate(shares, 1):
        if table is None or step > 1:
            table = current.table([options.criterion])
        plan = plan_removal(current, table, options, share, removed)
        measured = context if step == 1 else current  # all cells of a sweep share the dense model's moments
        added_bias |= _compensate(measured, model, plan.removed, removed, options)
        removed, how = plan.removed, apply if step == len(shares) else "mask"
        numbers = _remove(model, current.groups, removed, how, gate)
        if options.compensate == "batch_norm":
            reestimate_batch_norm(model, context.all_batches)
        if finetune is not None:
            finetuned = finetune(model, partial(zero, groups=current.groups, removed=removed if how == "mask" else {}))
        current = replace(current, _moments={})
    about = {**plan.about, "added_bias": sorted(added_bias), "dense_fingerprint": context.fingerprint}
    plan = RemovalPlan(removed, about)
    dense = structure(context.model)
    return Pruned(model, plan, table, current.groups, apply, origin_of(context.model), dense, numbers, finetuned)


def _compensate(measured: PruningContext, model: nn.Module, removed: Removed, before: Removed, options: PruningOptions) -> set[str]:
    """Compensates for the units removed since ``before``; returns the modules to which a bias was added."""
    if options.compensate not in ("bias", "least_squares"):
        return set()
    new = {name: sorted({*units} - {*before.get(name, ())}) for name, units in removed.items()}
    moments = measured.moments(options.compensate == "least_squares")
    return set(compensate_units(model, measured.groups, new, moments, options.compensate, measured.norms()))


def _remove(model: nn.Module, groups: PruningGroups, removed: Removed, apply: Apply, gate: float) -> Mapping[str, Any]:
    """Removes units in place; returns the counts stored by modules that slicing changed."""
    if apply == "slice":
        numbers = updated_counts(model, groups, removed)
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
    """Prunes a copy of a model: removes the units that a criterion ranks lowest. The model itself is not changed.

    criterion: name of a published criterion or a metric, {name: signed weight}, or the long form of ``Criterion``. amount: share
    of the budget (units, params or macs) to remove. data: calibration batches as for ``nl.analyze``, a loader or a list that can
    be read several times; criteria of weights need none. example_inputs: one batch, if there are no data. scope: groups by name,
    pattern or kind (ffn, head, kv_group, channel, moe_ffn; expert for whole experts, which ``*`` leaves out); freeze: groups not
    to prune; protect: {group: units to keep}; allow_approximate: include groups over which a norm reduces. allocation: uniform,
    global, erk, lamp, isomorphic, or an ``Allocation``. mode: remove low, high or random scores.
    apply: slice (smaller tensors), mask (zeros), scale (removed units times ``gate``). compensate: none, bias, least_squares,
    batch_norm. schedule: one_shot, or an iterative ``Schedule``. finetune: a callable such as ``Finetune``. options are
    those of ``nl.analyze``, as ``AnalyzeOptions`` lists them. Raises ValueError for arguments that do not fit the model or each
    other; TypeError for an unknown option.
    """
    known = [name for name in inspect.signature(prune).parameters if name != "options"]
    check_names("nl.prune", options, [*known, *(field.name for field in fields(AnalyzeOptions))])
    if data is not None and iter(data) is data:
        raise ValueError("data can be read only once, but graph, scores and moments each read them: give a loader or a list")
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
