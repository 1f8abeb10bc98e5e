"""``nl.analyze``: measures a model in as few passes over the data as possible, usually one."""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.network.batch import Batch, logits_of
from nodelens.network.eval_mode import differentiable, eval_mode
from nodelens.network.group_layer import GroupLayer
from nodelens.network.hooks import Capture, edit
from nodelens.network.targets import Loss, summed_loss
from nodelens.results.result import Result, fingerprint, provenance
from nodelens.statistics import Accumulator, Statistic
from nodelens.statistics.processes import first_of, reduce_sums, reduce_tensor, world

from .collect import Pass
from .covariance import CovariancePolicy
from .dry_run import DryRun, with_groups
from .options import AnalyzeOptions, check_kind
from .plan import Plan
from .request import Layers, Metrics, as_layers, as_metrics, describe, names_of, targets_of
from .several_passes import check_again, divided, joined
from .table import make_table
from .validation import find_members, in_bytes
from .wide_sites import describe as describe_covariance

DEFAULT = (
    "activation_mean",
    "activation_variance",
    "activation_rms",
    "zero_fraction",
    "rq",
    "redundancy",
    "synergy",
    "taylor",
    "effective_rank",
    "participation_ratio",
    "magnitude",
)


@torch.inference_mode(False)
def analyze(
    model: nn.Module,
    data: Iterable[Any] | None,
    metrics: Metrics = DEFAULT,
    layers: Layers = "*",
    *,
    initial: nn.Module | Mapping[str, Tensor] | None = None,
    options: AnalyzeOptions | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    **named: Any,
) -> Result:
    """Measures the units of a model in one pass over the data, in eval mode, on the device of its parameters.

    data:     batches, each a tensor, an (x, y) pair or a dict (input_ids, attention_mask, labels, ids). Under a process group, each
              process passes its own share. None is allowed if all metrics read weights only
    metrics:  names, metric objects, or {column: metric}
    layers:   a name, a glob, a role, a list of them, or pruning groups
    initial:  the network before training, or its state dict, for metrics of the weights' change
    options:  ``AnalyzeOptions``; each of its fields can also be passed by name, as in ``groups=16``
    on_plan:  called with the plan before the data are read
    progress: wraps the batches of each pass, for a progress bar

    Returns the tables of units, layers and layer pairs. Raises ValueError for names without a match, data that do not fit the model
    and missing labels; MemoryError beyond the budget; TypeError for an unknown option.
    """
    started = time.perf_counter()
    check_kind("nl.analyze", options, AnalyzeOptions)
    settings = (options or AnalyzeOptions()).with_named(named)
    groups, seed = settings.groups, settings.seed
    chosen, device = as_metrics(metrics), device_of(model)
    start = initial.state_dict() if isinstance(initial, nn.Module) else initial
    found = as_layers(model, layers, start)
    members = find_members(model, found, chosen, start)
    reads = [name for name, metric in chosen.items() if metric.needs()]
    if data is None and reads:
        are = "are" if len(reads) > 1 else "is"
        raise ValueError(f"{', '.join(reads)} {are} measured on data: give data=, or a criterion of weights such as magnitude")
    weights_only = data is None or (not reads and all(isinstance(layer, GroupLayer) for layer in found))
    batches = iter(() if weights_only else data)  # type: ignore[arg-type]
    first_given = next(batches, None)
    first = None if first_given is None else Batch.of(first_given, groups, seed).to(device)
    observed = members.observed(found)
    seen = first_of(None if first is None else (DryRun.of(model, observed, first), _per_token(first)))
    seen = (DryRun.of_weights(observed), []) if weights_only else seen
    if seen is None:
        raise ValueError("the data are empty: not one batch to measure")
    dry_run, per_token = seen
    policy = CovariancePolicy.of(settings.covariance, settings.width, seed, settings.max_passes)
    plan = Plan.of(
        model,
        found,
        chosen,
        with_groups(dry_run, members),
        groups,
        settings.positions,
        layers == "*",
        settings.precision,
        settings.pairs,
        per_token,
        policy,
        members,
        seed,
        settings.reduce,
    )
    parts = divided(plan, in_bytes(settings.budget), settings.max_passes)
    several_rounds = plan.rounds > 1
    check_again(batches is data, len(parts) + plan.rounds - 1, device)
    source: Any = () if weights_only else data
    if on_plan:
        on_plan(plan)
    planned = time.perf_counter()
    every = [] if first_given is None else itertools.chain([first_given], batches)
    seconds = {"plan": planned - started, "pass": 0.0, "table": 0.0}
    results: list[Result] = []
    for part in parts:
        pass_start = time.perf_counter()
        collected = run_pass(model, part, source if results or several_rounds else every, seed, settings.loss, progress)
        passed = time.perf_counter()
        results.append(finish(part, collected, device, settings.bias, seed))
        del collected  # free the sums before the next pass allocates its own
        seconds["pass"] += passed - pass_start
        seconds["table"] += time.perf_counter() - passed
    result = joined(plan, results)
    result.metadata |= {
        "seed": seed,
        "layers": names_of(model, layers, found),
        "seconds": seconds,
        "model": {"class": type(model).__name__, "fingerprint": fingerprint(model)},
    }
    return result


@torch.inference_mode(False)
def run_pass(
    model: nn.Module,
    plan: Plan,
    data: Iterable[Any],
    seed: int = 0,
    loss: Loss = summed_loss,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Pass:
    """Runs the plan's collectors over every batch and returns them. The model's state is restored, also after an error."""
    collected, device = Pass(plan, seed), device_of(model)
    weights = list({id(p): p for sums in collected.model_sums for p in sums.parameters}.values())
    graph = plan.gradients or bool(weights)
    from_inputs = graph and bool(plan.overwritten)  # a graph that starts at a layer would break at an in-place operation
    first = [module for module in model.modules() if from_inputs and isinstance(module, nn.Embedding)]
    for k in range(collected.rounds):
        collected.begin_round(k)
        sites = collected.sites(k)
        runs_model = bool(sites) or any(sums.forward for sums in collected.model_sums) or not collected.model_sums
        capture = Capture(sites, collected.see, plan.overwritten)
        with eval_mode(model), differentiable(weights), edit(dict.fromkeys(first, _start_graph)), capture:
            for given in progress(data):
                batch = Batch.of(given, plan.groups, seed).sorted().to(device)
                if from_inputs:
                    named = {k: _require_grad(v) for k, v in batch.kwargs.items()}
                    batch = replace(batch, args=tuple(map(_require_grad, batch.args)), kwargs=named)
                collected.begin(batch)
                collected.end(_forward(model, batch, capture, loss if graph else None, bool(weights)) if runs_model else None, loss)
                for tensor in weights:
                    tensor.grad = None
    collected.flush()
    return collected


def finish(plan: Plan, collected: Pass, device: torch.device, bias: bool = False, seed: int = 0) -> Result:
    """The result of one pass, summed over all processes under a process group. Every process must call it."""
    sums = collected.sums()
    reduce_sums({key: a for key, a in sums.items() if isinstance(a, Accumulator)}, device)
    for total in collected.model_sums:
        total.reduce()
    samples = reduce_tensor(collected.samples.to(device)).cpu()
    left_out = reduce_tensor(torch.tensor([c.left_out for c in collected.collectors.values()], device=device)).tolist()
    for accumulator in sums.values():
        accumulator.to(torch.device("cpu"))
    table = make_table(plan, sums, samples, bias, seed)
    rows = [{"layer": layer, "statistic": str(need), "rows": _rows_of(a.value)} for (layer, need), a in sums.items()]
    metadata = provenance() | {
        "metrics": {name: describe(metric) | targets_of(plan, metric) for name, metric in plan.metrics.items()},
        "samples": int(samples.sum()),
        "groups": plan.groups,
        "samples_by_group": samples.tolist(),
        "positions": plan.positions,
        "precision": plan.precision,
        "processes": world()[1],
        "rows": rows,
        "missing": table.missing,
        "counts": table.counts,
        "model_values": table.model,
        "left_out": [{"site": str(s), "rows": n} for s, n in zip(collected.collectors, left_out, strict=True) if n],
        "never_called": plan.never_called,
        "outputs": [la.title for la in plan.layers if plan.seen(la, "output").final],
        "plan": {"statistics": plan.rows(), "bytes": plan.total_bytes, "estimated_overhead": plan.overhead()},
        "passes": [{"layers": [la.title for la in plan.measured], "bytes": plan.total_bytes}],
        "covariance": describe_covariance(plan),
    }
    return Result(table.units, table.layers, table.matrices, metadata, table.edges)


def _rows_of(value: Any) -> int:
    """Number of rows that a statistic has seen."""
    counted = value.tensors() if isinstance(value, Statistic) else {}
    return int(counted["n" if "n" in counted else "seen"].sum()) if counted else 0


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter or buffer; the CPU for a model without any."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def _per_token(batch: Batch) -> list[str]:
    """Which of the targets label and given have one value per token."""
    inputs = [t for t in (*batch.args, *batch.kwargs.values()) if isinstance(t, Tensor) and t.ndim > 1]
    candidates = {"label": batch.labels, "given": batch.targets}
    return [k for k, t in candidates.items() if t is not None and t.ndim > 1 and any(t.shape[1] == x.shape[1] for x in inputs)]


def _start_graph(embedded: Tensor) -> Tensor:
    """An embedding's output as a leaf of the graph, copied because later operations may write into it in place."""
    return embedded.detach().requires_grad_().clone() if torch.is_grad_enabled() else embedded


def _require_grad(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def _forward(model: nn.Module, batch: Batch, capture: Capture, loss: Loss | None, weights: bool = False) -> Tensor:
    capture.gate = True
    try:
        with torch.set_grad_enabled(loss is not None):
            logits = logits_of(batch.run(model))
            capture.gate = False
            if loss is not None:
                total = loss(logits, batch.labels)
                if total.requires_grad:
                    total.backward()
                elif weights:
                    raise ValueError("the loss does not depend on the weights: loss= gives a number without a gradient")
    finally:
        capture.gate = False
    return logits.detach()
