"""``nl.analyze``: measures a model in as few passes over the data as possible, usually one."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.messages import keywords_of, kind_of
from nodelens.metrics import Metric
from nodelens.network.arguments import check_arguments
from nodelens.network.eval_mode import one_at_a_time, uncompiled
from nodelens.network.group_layer import GroupLayer
from nodelens.network.hooks import Capture
from nodelens.network.layers import Layer
from nodelens.network.objective import Objective
from nodelens.network.sharded import class_name, is_sharded
from nodelens.results.left_out import left_out_rows, warn_of_rows
from nodelens.results.result import Result, fingerprint, provenance
from nodelens.statistics import Accumulator, kernels
from nodelens.statistics.processes import first_of, gathered, reduce_sums, reduce_tensor, world
from nodelens.statistics.repeats import repeats_warning
from nodelens.statistics.sample_hash import balanced_cuts

from .association_facts import facts_of
from .associations import differentiates, methods_of, zero_associations
from .collect import Pass
from .covariance import CovariancePolicy
from .driver import Driver, Progress, device_of, first_of_data, naming, shared_first
from .dry_run import DryRun, with_groups
from .lost_gradients import check_gradients, check_weights, underived, unread_layers
from .members import Members, UnreadableGroupsError
from .metric_sums import SampleCounts, rows_of
from .options import AnalyzeOptions, check_kind
from .plan import Plan
from .request import Layers, Metrics, as_layers, as_metrics, describe_metrics, names_of
from .sample_axis import NoSampleAxisError
from .saved_sums import SavedPass, key_of, saved_sums
from .several_passes import check_again, divided, joined
from .table import make_table
from .validation import check_classes, check_sharded, find_members, in_bytes, targets_by_token
from .wide_sites import describe as describe_covariance


@one_at_a_time
@torch.inference_mode(False)
def analyze(
    model: nn.Module,
    data: Iterable[Any] | None,
    metrics: Metrics = "default",
    layers: Layers = "*",
    *,
    initial: nn.Module | Mapping[str, Tensor] | None = None,
    options: AnalyzeOptions | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    **named: Any,
) -> Result:
    """Measures the units of a model in one pass over the data: ``nl.analyze`` without its further analyses.

    Arguments, result and errors are those of ``nl.analyze``.
    """
    model = uncompiled(model)
    result = measure(model, data, metrics, layers, initial=initial, options=options, on_plan=on_plan, progress=progress, **named)
    result.metadata["model"] = {"class": class_name(model), "fingerprint": fingerprint(model)}
    return result


@one_at_a_time
@torch.inference_mode(False)
def measure(
    model: nn.Module,
    data: Iterable[Any] | None,
    metrics: Metrics,
    layers: Layers,
    *,
    initial: nn.Module | Mapping[str, Tensor] | None = None,
    options: AnalyzeOptions | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    **named: Any,
) -> Result:
    """The result of ``analyze`` without the model's fingerprint, for which all weights are read."""
    started, compiled, model = time.perf_counter(), kernels.seconds(), uncompiled(model)
    check_kind("nl.analyze", options, AnalyzeOptions)
    check_arguments("nl.analyze", model, data, sharded=True)
    settings = (options or AnalyzeOptions()).with_named(named, "nl.analyze", keywords_of(analyze))
    for name, given in {"on_plan": on_plan or iter, "progress": progress}.items():
        if not callable(given):
            raise TypeError(f"{name} is {kind_of(given)}; it is a function, such as print for on_plan= and tqdm for progress=")
    chosen = as_metrics(metrics)
    check_sharded(model, chosen)
    asked = _Request.of(model, data, chosen, layers, initial, settings)
    plan, objective = _planned(model, asked, layers == "*", settings)
    parts = divided(plan, in_bytes(settings.budget), settings.max_passes)
    check_again(data is not None and iter(data) is data, len(parts) + plan.rounds - 1, device_of(model))
    if on_plan:
        on_plan(plan)
    seconds = {"plan": time.perf_counter() - started, "kernels": kernels.seconds() - compiled, "pass": 0.0, "table": 0.0}
    seconds["plan"] -= seconds["kernels"]
    results = list[Result]()
    key = partial(key_of, model, parts, objective, asked.first, settings.seed)
    with saved_sums(settings.save_to, settings.save_minutes, key, asked.again) as saved:
        for k, part in enumerate(parts):
            pass_start = time.perf_counter()
            batches = asked.again if results or plan.rounds > 1 else asked.once
            own = None if saved is None else saved.of_pass(k)
            collected = run_pass(model, part, batches, objective, settings.seed, progress, own)
            passed = time.perf_counter()
            results.append(finish(part, collected, device_of(model), settings.bias, settings.seed))
            del collected  # free the sums before the next pass allocates its own
            seconds["pass"] += passed - pass_start
            seconds["table"] += time.perf_counter() - passed
    result = joined(plan, results)
    later = kernels.seconds() - compiled - seconds["kernels"]  # loops for rows of another dtype
    seconds |= {"kernels": seconds["kernels"] + later, "pass": seconds["pass"] - later}
    warn_of_rows(result.metadata["left_out"])
    result.metadata |= {
        "seed": settings.seed,
        "layers": names_of(model, layers, asked.layers),
        "seconds": seconds,
        "objective": objective.about,
    }
    return result


@dataclass
class _Request:
    """What is measured, and the data: ``once`` with the batch that the plan was made from, ``again`` for further readings."""

    metrics: dict[str, Metric]
    layers: list[Layer]
    members: Members
    first: Any
    once: Iterable[Any]
    again: Iterable[Any]
    weights_only: bool

    @classmethod
    def of(
        cls, model: nn.Module, data: Any, metrics: dict[str, Metric], layers: Layers, initial: Any, settings: AnalyzeOptions
    ) -> "_Request":
        if not isinstance(initial, (nn.Module, Mapping, type(None))):
            raise TypeError(f"initial is {kind_of(initial)}; it is the network before training, or its state dict")
        start = initial.state_dict() if isinstance(initial, nn.Module) else initial
        found = as_layers(model, layers, start)
        reads = [name for name, metric in metrics.items() if metric.needs()]
        if data is None and reads:
            are = "are" if len(reads) > 1 else "is"
            raise ValueError(f"{', '.join(reads)} {are} measured on data: give data=, or a criterion of weights such as magnitude")
        weights_only = data is None or (not reads and all(isinstance(layer, GroupLayer) for layer in found))
        again: Any = () if weights_only else data
        members = find_members(model, found, metrics, start)
        first = shared_first if is_sharded(model) and not weights_only else first_of_data
        return cls(metrics, found, members, *first(again, Objective.of(model)), again, weights_only)


def _planned(model: nn.Module, asked: _Request, optional: bool, settings: AnalyzeOptions) -> tuple[Plan, Objective]:
    """The plan, from a dry run of the first batch, and the objective that this batch settles."""
    objective = Objective.of(model, settings.output, settings.task, settings.loss)
    observed = asked.members.observed(asked.layers)
    seen = batch = None
    if asked.weights_only:
        seen = objective, DryRun.of_weights(observed), list[str]()
    elif asked.first is not None:
        objective = objective.settled(model, asked.first)
        batch = objective.batch(asked.first, settings.groups, settings.seed).to(device_of(model))
        try:
            dry_run = DryRun.of(model, observed, batch, objective, optional)
        except NoSampleAxisError as error:
            text = asked.members.without_samples(error.shapes) or str(error)
            raise UnreadableGroupsError(text, asked.members.unread(error.shapes)) from error
        if differentiates(asked.metrics.values()):
            dry_run = replace(dry_run, facts=facts_of(model, asked.layers, batch, objective))
        seen = objective, dry_run, targets_by_token(batch)
    found = seen if asked.weights_only else first_of(seen)
    if found is None:
        raise ValueError(
            "the data are empty: not one batch to measure. An iterator is empty after one reading: give a loader or a list"
        )
    objective, dry_run, per_token = found
    if batch is not None:
        check_classes(asked.metrics, batch, dry_run.tokens)
    plan = Plan.of(
        model,
        asked.layers,
        asked.metrics,
        with_groups(dry_run, asked.members),
        settings.groups,
        settings.positions,
        optional,
        settings.precision,
        settings.pairs,
        per_token,
        CovariancePolicy.of(settings.covariance, settings.width, settings.seed, settings.max_passes),
        asked.members,
        settings.seed,
        settings.reduce,
    )
    known = {} if batch is None else {id(asked.first): batch.hashes}
    hashes = {} if asked.weights_only or settings.groups < 2 else hashes_of(asked.again, objective, known)
    cuts = None if asked.weights_only else cuts_of(asked.again, hashes, settings.groups, settings.seed, objective)
    plan = plan.with_kernels(settings.kernels, device_of(model), length_hint(asked.again, 100))
    return replace(plan, cuts=cuts, hashes=hashes), objective


def run_pass(
    model: nn.Module,
    plan: Plan,
    data: Iterable[Any],
    objective: Objective,
    seed: int = 0,
    progress: Progress = iter,
    saved: SavedPass | None = None,
    collected: Pass | None = None,
) -> Pass:
    """Runs the plan's collectors, or those given, over every batch and returns them. saved: where sums may be stored."""
    collected = Pass(plan, objective, seed, saves=saved is not None) if collected is None else collected
    begun = None if saved is None else saved.restore(collected)
    weights = tuple({id(p): p for sums in collected.model_sums for p in sums.parameters}.values())
    graph = plan.gradients or bool(weights)
    reads = (model, objective, plan.groups, seed, graph, weights)
    for k in range(begun or 0, collected.rounds):
        if k != begun:
            collected.begin_round(k)
        sites = collected.sites(k)
        capture = Capture(sites, collected.see, plan.overwritten)
        derives = bool(collected.derivatives) and not k
        driver = Driver(
            *reads,
            from_inputs=plan.from_inputs or (graph and bool(plan.overwritten)),
            runs_model=bool(sites) or any(sums.forward for sums in collected.model_sums) or not collected.model_sums,
            answers=graph or derives or plan.reads_predictions,
            on_graph=collected.differentiate if derives else None,
            cuts=plan.cuts,
            hashes=plan.hashes,
            progress=progress,
        )
        if not k:
            driver.on_first = partial(check_gradients, model, plan, capture, collected, objective)
            driver.on_last = partial(check_weights, model, plan, collected.model_sums, objective)
        driver.run(data if saved is None else saved.rest(data, collected), collected, capture)
        if saved is not None:
            saved.finish(collected)
    collected.flush()
    return collected


def finish(plan: Plan, collected: Pass, device: torch.device, bias: bool = False, seed: int = 0) -> Result:
    """The result of one pass, summed over all processes under a process group. Every process must call it."""
    sums = collected.sums()
    traffic = reduce_sums({key: a for key, a in sums.items() if isinstance(a, Accumulator)}, device)
    for total in collected.model_sums:
        total.reduce()
    counts = {name: reduce_tensor(count.to(device)).cpu() for name, count in collected.counts().items()}
    samples, sites = counts["samples"], list(collected.collectors)
    lost = {(site.layer.name, site.port): each for site, each in zip(sites, counts["lost"], strict=True)}
    for accumulator in sums.values():
        accumulator.to(torch.device("cpu"))
    plan = plan.without(*unread_layers(plan, collected), underived(collected))
    table = make_table(plan, sums, SampleCounts(samples, counts["unlabelled"], lost), bias, seed)
    rows = [{"layer": layer, "statistic": str(need), "rows": rows_of(a.value)} for (layer, need), a in sums.items()]
    metadata = provenance() | {
        "metrics": describe_metrics(plan),
        "samples": int(samples.sum()),
        "groups": plan.groups,
        "samples_by_group": samples.tolist(),
        "filled_groups": int((samples > 0).sum()),
        "positions": plan.positions,
        "precision": plan.precision,
        "kernels": plan.kernels,
        "processes": world()[1],
        "traffic": {"sums": traffic.sums, "sent": traffic.sent},
        "rows": rows,
        "missing": table.missing,
        "warnings": [*plan.notes, *repeats_warning(collected.repeats), *zero_associations(plan, table.matrices)],
        "counts": table.counts,
        "model_values": table.model,
        "left_out": left_out_rows(map(str, sites), counts["left_out"].tolist(), counts["rows_seen"].tolist()),
        "never_called": plan.never_called,
        "outputs": [la.title for la in plan.layers if plan.seen(la, "output").final],
        "plan": {"statistics": plan.rows(), "bytes": plan.total_bytes, "estimated_overhead": plan.overhead()},
        "passes": [{"layers": [la.title for la in plan.measured], "bytes": plan.total_bytes}],
        "covariance": describe_covariance(plan),
        **({"associations": methods} if (methods := methods_of(plan)) else {}),
    }
    return Result(table.units, table.layers, table.matrices, metadata, table.edges)


def hashes_of(data: Any, objective: Objective, known: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """The hashes of the samples of each batch of a list, by the id of the batch; ``known`` need not be computed.

    None of other data, and of subclasses of lists, which may make a batch when it is asked for: another one may have its id then.
    """
    if type(data) not in (list, tuple):
        return {}
    return {id(given): known[id(given)] if id(given) in known else _hashes(k, given, objective) for k, given in enumerate(data)}


def cuts_of(data: Any, hashes: Mapping[int, Tensor], groups: int, seed: int, objective: Objective) -> Tensor | None:
    """Cuts between groups of samples of equal size, from all samples of all processes; None unless all have lists. Collective."""
    own: list[Tensor] | None = None
    if isinstance(data, (list, tuple)) and groups > 1:
        own = [hashes[id(given)] if hashes else _hashes(k, given, objective) for k, given in enumerate(data)]
    every = gathered(None if own is None else torch.cat([torch.empty(0, dtype=torch.int64), *own]))
    return None if any(hashes is None for hashes in every) else balanced_cuts(torch.cat(every), groups, seed)


def _hashes(number: int, given: Any, objective: Objective) -> Tensor:
    with naming(number):
        return objective.batch(given).hashes
