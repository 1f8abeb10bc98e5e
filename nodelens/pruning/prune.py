"""Prune a network: score its units, allocate a budget, select and remove units, compensate, fine-tune."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import pandas as pd
from torch import nn

from nodelens.engine.driver import first_of_data
from nodelens.engine.options import AnalyzeOptions, check_kind
from nodelens.messages import check_names, keywords_of, with_new_names
from nodelens.metrics import Metric
from nodelens.network.arguments import check_arguments
from nodelens.network.eval_mode import copy_of, one_at_a_time, uncompiled
from nodelens.network.groups import PruningGroups
from nodelens.network.objective import Objective
from nodelens.pruning.allocation.allocate import Allocation
from nodelens.pruning.criteria.criterion import Criterion, Spec
from nodelens.pruning.criteria.given import GIVEN, Scores, given_scores, is_given
from nodelens.pruning.criteria.scoring import columns_of
from nodelens.pruning.hub.push import push_folder
from nodelens.pruning.surgery.compensate import compensate_units, reestimate_batch_norm
from nodelens.pruning.surgery.mask import Removed, gates_of, scale, zero
from nodelens.pruning.surgery.save import save_pruned
from nodelens.pruning.surgery.slice import slice_units, updated_counts
from nodelens.pruning.surgery.structure import origin_of, structure
from nodelens.statistics.seeding import seeded

from .context import PruningContext
from .planning import Apply, PruningOptions, Schedule, plan_removal, without
from .removal_plan import RemovalPlan

_SIZES = {"params": "parameters", "macs": "multiply-accumulate operations per sample"}


class FineTuning(Protocol):
    """Trains a pruned model in place; calls ``zeros`` so that removed units stay zero. Returns what it reports.

    Called with the global generators seeded by the seed of the pruning. If it has a method ``of_pruned(model, groups, removed,
    sliced)``, what this returns is called instead: it may depend on the units that are left.
    """

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
        """What was removed, and what is left, in two lines; a third says how many units a tie-break decided about, if any."""
        about, units = self.plan.about, sum(group.n for group in self.groups)
        gone = sum(map(len, self.plan.removed.values()))
        sizes = [
            f"{name}: {about[f'dense_{key}']:,} -> {about[key]:,}" for key, name in _SIZES.items() if about.get(key) is not None
        ]
        tied = sum(about.get("ties", {}).values())
        note = [f"{tied:,} units have the score of the cut: a permutation decided which of them stay"] if tied else []
        return "\n".join([f"{gone:,} of {units:,} units removed ({self.apply})", ", ".join(sizes), *note])

    def __repr__(self) -> str:
        return f"Pruned: {self.summary()}"

    @property
    def axes(self) -> PruningGroups:
        """The deprecated name of ``groups``."""
        warnings.warn("Pruned.axes is now Pruned.groups", DeprecationWarning, stacklevel=2)
        return self.groups

    def save(self, folder: str | Path, tokenizer: Any = None, sweep: pd.DataFrame | None = None) -> Path:
        """Writes weights and plan; ``load_pruned`` restores the model: smaller after a slice, with zeros after a mask.

        A model of transformers is also a folder of the hub. If its config can say the widths that are left, as with
        ``allocation="uniform"``, ``AutoModelForCausalLM.from_pretrained`` and what builds on it open the folder without nodelens.
        Otherwise it has a modelling file of its own, for which they need ``trust_remote_code=True``. tokenizer: one of
        transformers, saved with the model. sweep: a table as in ``sweep.parquet``, for the model card, ``README.md``.
        """
        return save_pruned(self, Path(folder), tokenizer, sweep)

    def push_to_hub(
        self,
        repo_id: str,
        token: str | None = None,
        private: bool | None = None,
        tokenizer: Any = None,
        sweep: pd.DataFrame | None = None,
    ) -> str:
        """Uploads what ``save`` writes to a repository of the hub, which is created if need be; returns the commit's address.

        token, private: as in huggingface_hub; None: the login of this machine, and the default of the account. Raises OSError,
        in one line, if the hub cannot be reached or refuses.
        """
        with TemporaryDirectory() as place:
            return push_folder(self.save(place, tokenizer, sweep), repo_id, token, private)


def carry_out(
    context: PruningContext,
    options: PruningOptions,
    table: pd.DataFrame | None = None,
    apply: Apply = "slice",
    finetune: FineTuning | None = None,
    gate: float = 0.0,
    first: RemovalPlan | None = None,
) -> Pruned:
    """Prunes a copy of the context's model. table: scores for the first step; later steps of a schedule measure their own.

    first: the plan of the first step, where it is known. It follows from the scores otherwise.
    Whatever is drawn on the way, in fine-tuning too, follows ``options.seed``; global random states are restored.
    """
    model = copy_of(context.model)
    current = replace(context, model=model)
    removed: Removed = {}
    finetuned: Mapping[str, Any] = {}
    added_bias: set[str] = set()
    shares = options.schedule.shares(options.amount)
    with seeded(options.seed, "prune"):
        for step, share in enumerate(shares, 1):
            if table is None or step > 1:
                table = current.table([options.criterion])
            plan = plan_removal(current, table, options, share, removed) if first is None or step > 1 else first
            measured = context if step == 1 else current  # all cells of a sweep share the dense model's moments
            added_bias |= _compensate(measured, model, plan.removed, removed, options)
            removed, how = plan.removed, apply if step == len(shares) else "mask"
            numbers = remove(model, current.groups, removed, how, gate)
            if options.compensate == "batch_norm":
                reestimate_batch_norm(model, context.all_batches)
            if finetune is not None:
                of_units = getattr(finetune, "of_pruned", None)  # rates of learning by unit
                tuned = finetune if of_units is None else of_units(model, current.groups, removed, how == "slice")
                finetuned = tuned(model, partial(zero, groups=current.groups, removed=removed if how == "mask" else {}))
            current = replace(current, _moments={})
    about = {**plan.about, "added_bias": sorted(added_bias), "dense_fingerprint": context.fingerprint}
    plan = RemovalPlan(removed, about)
    dense = structure(context.model, structure(model))
    return Pruned(model, plan, table, current.groups, apply, origin_of(context.model), dense, numbers, finetuned)


def _compensate(measured: PruningContext, model: nn.Module, removed: Removed, before: Removed, options: PruningOptions) -> set[str]:
    """Compensates for the units removed since ``before``; returns the modules to which a bias was added."""
    if options.compensate not in ("bias", "least_squares"):
        return set()
    new = without(removed, before)
    moments = measured.moments(options.compensate == "least_squares")
    return set(compensate_units(model, measured.groups, new, moments, options.compensate, measured.norms()))


def remove(model: nn.Module, groups: PruningGroups, removed: Removed, apply: Apply, gate: float = 0.0) -> Mapping[str, Any]:
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


@one_at_a_time
def prune(
    model: nn.Module,
    criterion: Spec | Metric | Scores | None = None,
    amount: float | None = None,
    *,
    data: Iterable[Any] | None = None,
    example_inputs: Any = None,
    finetune: FineTuning | None = None,
    options: PruningOptions | None = None,
    **named: Any,
) -> Pruned:
    """Prunes a copy of a model: removes the units that a criterion ranks lowest. The model itself is not changed.

    A compiled model is pruned as the network inside: compile the result again. Calls from several threads run one after the other.

    criterion:      name of a published criterion or a metric, a metric object, {name: signed weight}, or the long form of
                    ``Criterion``; or given scores: a table of units, {layer or group: tensor (units,)}, or a function of a group,
                    in all of which units with high scores stay; taylor
    amount:         share of the budget to remove; 0.5
    data:           calibration batches as for ``nl.analyze``, a loader or a list that can be read several times; criteria of
                    weights need none
    example_inputs: one batch, if there are no data
    finetune:       a callable such as ``Finetune``, whose order of samples, dropout and transforms follow ``seed``
    options:        ``PruningOptions``; each of its fields can be given by name as well, and so can those of ``AnalyzeOptions`` and
                    ``initial``, which tell how scores are measured. Allocation, schedule and criterion may be names

    Raises ValueError for arguments that do not fit the model or each other; TypeError for an unknown option.
    """
    model = uncompiled(model)
    check_kind("nl.prune", options, PruningOptions)
    check_arguments("nl.prune", model, data if data is not None else criterion if isinstance(criterion, nn.Module) else None)
    of_pruning, of_measuring = ([each.name for each in fields(kind)] for kind in (PruningOptions, AnalyzeOptions))
    of_measuring += ["initial", "on_plan", "progress"]
    named = with_new_names("nl.prune", named)
    finetune = named.pop("finetune", finetune)
    _check_callables(criterion, finetune)
    check_names("nl.prune", named, [*of_pruning, *of_measuring, *keywords_of(prune)])
    scores = criterion if is_given(criterion) else None
    columns = {criterion.names[0]: criterion} if isinstance(criterion, Metric) else {}
    named_criterion = GIVEN if scores is not None else next(iter(columns), criterion)
    given = {"criterion": named_criterion, "amount": amount} | {name: value for name, value in named.items() if name in of_pruning}
    asked = replace(options or PruningOptions(), **_as_objects({k: v for k, v in given.items() if v is not None}))
    if scores is None:
        columns_of([asked.criterion], columns)  # names are checked before groups are sought
    with seeded(asked.seed, "prune"):
        if data is not None and iter(data) is data:
            raise ValueError("data can be read only once, but graph, scores and moments each read them: give a loader or a list")
        objective = Objective.of(model, asked.output, asked.task, asked.loss)
        batch = example_inputs if example_inputs is not None or data is None else first_of_data(data, objective)[0]
        objective = objective if batch is None else objective.settled(model, batch)
        context = PruningContext.of(
            model,
            None if batch is None else objective.batch(batch, seed=asked.seed),
            data,
            scope=asked.scope,
            freeze=asked.freeze,
            allow_approximate=asked.allow_approximate,
            custom_groups=asked.custom_groups,
            seed=asked.seed,
            reduce=asked.reduce,
            objective=objective,
            columns=columns,
            options={name: value for name, value in named.items() if name not in of_pruning},
        )
        context.scores = None if scores is None else given_scores(scores, context.groups, asked.reduce)
        return carry_out(context, asked, None, asked.apply, finetune, asked.gate)


def _check_callables(criterion: Any, finetune: Any) -> None:
    """Raises TypeError for data in the place of the criterion, and for fine-tuning that cannot be called."""
    if isinstance(criterion, Iterable) and not isinstance(criterion, (str, Mapping, pd.DataFrame, pd.Series)):
        raise TypeError(
            f"nl.prune: criterion is {type(criterion).__name__}; it is a metric's name such as 'taylor', or weights by name. Data "
            "are given by name, nl.prune(model, data=...)"
        )
    if finetune is not None and not callable(finetune):
        raise TypeError(f"nl.prune: finetune is {finetune!r}; it is a callable, such as nl.Finetune(train, epochs=3)")


def _as_objects(given: dict[str, Any]) -> dict[str, Any]:
    """Options in which a criterion, an allocation and a schedule that are named are objects."""
    kinds: dict[str, Callable[[Any], Any]] = {"allocation": Allocation, "schedule": _schedule}
    named = {name: kind(given[name]) for name, kind in kinds.items() if isinstance(given.get(name), str)}
    return given | named | ({"criterion": Criterion.of(given["criterion"])} if "criterion" in given else {})


def _schedule(name: str) -> Schedule:
    """A schedule by name: ``iterative`` takes five steps, as ``conf/schedule/iterative.yaml`` does."""
    return Schedule(name, 5 if name == "iterative" else 1)  # type: ignore[arg-type]
