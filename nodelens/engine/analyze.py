"""One pass over the data, and what it found."""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.metrics import Metric, get_metric
from nodelens.metrics.need import Other
from nodelens.network.batch import Batch, logits_of
from nodelens.network.eval_mode import eval_mode
from nodelens.network.find_layers import find_layers, resolved
from nodelens.network.hooks import Capture, edit
from nodelens.network.targets import summed_loss
from nodelens.results.result import Result, fingerprint, provenance
from nodelens.statistics import Statistic
from nodelens.statistics.processes import first_of, reduce_sums, reduce_tensor, world

from .collect import Pass
from .covariance import LIMIT, CovariancePolicy
from .covariance import describe as describe_covariance
from .dry_run import DryRun
from .plan import Plan
from .several_passes import check_again, divided, joined
from .table import make_table

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
Loss = Callable[[Tensor, Tensor | None], Tensor]
Metrics = Sequence[str | Metric] | Mapping[str, Metric]


@torch.inference_mode(False)
def analyze(
    model: nn.Module,
    data: Iterable[Any],
    metrics: Metrics = DEFAULT,
    layers: str | Sequence[str] = "*",
    *,
    seed: int = 0,
    groups: int = 8,
    positions: int | None = None,
    precision: str = "float32",
    pairs: str | Sequence[Sequence[str]] = "consecutive",
    initial: nn.Module | Mapping[str, Tensor] | None = None,
    bias: bool = False,
    loss: Loss = summed_loss,
    covariance: str | None = None,
    width: int = LIMIT,
    budget: float | None = None,
    max_passes: int = 1,
    on_plan: Callable[[Plan], None] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Result:
    """Measures the units of a model in one pass over the data, in eval mode, on the device where its parameters lie.

    data: batches, each a tensor, an (x, y) pair or a dict (input_ids, attention_mask, labels, ids); under a process group
    each process gives its own share. metrics: names, metric objects, or {column: metric}. layers: a name, a glob or a list.
    groups: of samples, for the jackknife. positions: how many positions of each image pair statistics read, None
    for all. precision: of products, float32 or float64 (rows that are float64 keep it). pairs: of layers that edge metrics
    compare: consecutive, all, or names. initial: the network before training, or its state dict, for metrics of the weights'
    change. bias: write the jackknife's estimate of each value's bias beside it, ``<metric>_bias``; nothing is subtracted.
    loss: of (logits, labels), summed over the batch. covariance: where products of units are wanted of
    more than ``width`` of them: diagonal, sample:<count>, sketch:<count>, or None, an error that shows these choices
    (nodelens.engine.covariance has what each means). budget: bytes the plan may take;
    max_passes: how often the data may be read, some layers each time, so that the plan fits.

    Raises ValueError for names without a match, data that do not fit the model and labels that a metric needs but are not
    there; MemoryError over the budget.
    """
    started = time.perf_counter()
    chosen, device = as_metrics(metrics), device_of(model)
    batches = iter(data)
    head = next(batches, None)
    found = find_layers(model, layers, initial.state_dict() if isinstance(initial, nn.Module) else initial)
    first = None if head is None else Batch.of(head, groups, seed).to(device)
    seen = first_of(None if first is None else (DryRun.of(model, found, first), _per_token(first)))
    if seen is None:
        raise ValueError("the data are empty: not one batch to measure")
    dry_run, per_token = seen
    beyond = CovariancePolicy.of(covariance, width, seed, max_passes)
    plan = Plan.of(model, found, chosen, dry_run, groups, positions, layers == "*", precision, pairs, per_token, beyond)
    parts = divided(plan, budget, max_passes)
    check_again(batches is data, parts, device)
    if on_plan:
        on_plan(plan)
    planned = time.perf_counter()
    every = [] if head is None else itertools.chain([head], batches)
    seconds = {"plan": planned - started, "pass": 0.0, "table": 0.0}
    results: list[Result] = []
    for part in parts:
        begun = time.perf_counter()
        taken = run_pass(model, part, progress(data if results else every), seed, loss)
        passed = time.perf_counter()
        results.append(finish(part, taken, device, bias, seed))
        del taken  # its sums make room for the next pass's
        seconds["pass"] += passed - begun
        seconds["table"] += time.perf_counter() - passed
    result = joined(plan, results)
    result.metadata |= {
        "seed": seed,
        "layers": resolved(model, layers),
        "seconds": seconds,
        "model": {"class": type(model).__name__, "fingerprint": fingerprint(model)},
    }
    return result


@torch.inference_mode(False)
def run_pass(model: nn.Module, plan: Plan, data: Iterable[Any], seed: int = 0, loss: Loss = summed_loss) -> Pass:
    """Shows every batch to the plan's statistics. The model is as before when it ends, however it ends."""
    taken, device = Pass(plan, seed), device_of(model)
    capture = Capture(plan.sites(), taken.see, plan.overwritten)
    early = plan.gradients and bool(plan.overwritten)  # a graph that begins at a layer would not survive what is done in place
    first = [module for module in model.modules() if early and isinstance(module, nn.Embedding)]
    with eval_mode(model), edit(dict.fromkeys(first, _begun)), capture:
        for batch in data:
            batch = Batch.of(batch, plan.groups, seed).sorted().to(device)
            if early:
                named = {k: _differentiable(v) for k, v in batch.kwargs.items()}
                batch = replace(batch, args=tuple(map(_differentiable, batch.args)), kwargs=named)
            taken.begin(batch)
            taken.end(_forward(model, batch, capture, loss if plan.gradients else None))
    taken.flush()
    return taken


def finish(plan: Plan, taken: Pass, device: torch.device, bias: bool = False, seed: int = 0) -> Result:
    """The result of a pass; under a process group of all processes' passes together. Collective."""
    sums = taken.sums()
    reduce_sums(sums, device)
    samples = reduce_tensor(taken.samples.to(device)).cpu()
    left_out = reduce_tensor(torch.tensor([c.left_out for c in taken.collectors.values()], device=device)).tolist()
    for accumulator in sums.values():
        accumulator.to(torch.device("cpu"))
    table = make_table(plan, sums, samples, bias, seed)
    rows = [{"layer": layer, "statistic": str(need), "rows": _rows_of(a.value)} for (layer, need), a in sums.items()]
    metadata = provenance() | {
        "metrics": {name: describe(metric) | _targets_of(plan, metric) for name, metric in plan.metrics.items()},
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
        "left_out": [{"site": str(s), "rows": n} for s, n in zip(taken.collectors, left_out, strict=True) if n],
        "never_called": plan.never_called,
        "outputs": [la.name for la in plan.layers if plan.seen(la, "output").final],
        "plan": {"statistics": plan.rows(), "bytes": plan.total_bytes, "estimated_overhead": plan.overhead()},
        "passes": [{"layers": [la.name for la in plan.measured], "bytes": plan.total_bytes}],
        "covariance": describe_covariance(plan),
    }
    return Result(table.units, table.layers, table.matrices, metadata, table.edges)


def _rows_of(value: Statistic | None) -> int:
    """Rows that a statistic saw."""
    counted = {} if value is None else value.tensors()
    return int(counted["n" if "n" in counted else "seen"].sum()) if counted else 0


def as_metrics(metrics: Metrics) -> dict[str, Metric]:
    """{column: metric} of names and metric objects. Raises ValueError for a name asked for twice."""
    if isinstance(metrics, Mapping):
        return dict(metrics)
    chosen: dict[str, Metric] = {}
    for metric in metrics:
        name = metric if isinstance(metric, str) else metric.names[-1]
        if name in chosen:
            raise ValueError(f"metric {name!r} is asked for twice; give a dict {{column: metric}} to name two variants")
        chosen[name] = get_metric(metric) if isinstance(metric, str) else metric
    return chosen


def describe(metric: Metric) -> dict[str, Any]:
    """What a column is: the metric's name, options, needs, when NaN."""
    return {
        "metric": metric.names[0],
        "options": {k: getattr(v, "__name__", v) if callable(v) else v for k, v in metric.options.items()},
        "kind": metric.shape,
        "nan": metric.nan,
        "source": metric.source(),
        "needs": {name: str(need) for name, need in metric.needs().items()},
    }


def _targets_of(plan: Plan, metric: Metric) -> dict[str, list[str]]:
    """The targets that a metric has in this pass, in words: what became of ``auto``."""
    needs = [need for place in plan.places(metric)[:1] for _, need in plan.resolve(metric, place).values()]
    found = [need.target for need in needs if need.target and not isinstance(need.target, Other)]
    return {"targets": list(dict.fromkeys(str(getattr(target, "__name__", target)) for target in found))} if found else {}


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter or buffer lies; the CPU for one without any."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def _per_token(batch: Batch) -> list[str]:
    """Which of label and given the data have one of a token."""
    inputs = [t for t in (*batch.args, *batch.kwargs.values()) if isinstance(t, Tensor) and t.ndim > 1]
    beside = {"label": batch.labels, "given": batch.targets}
    return [k for k, t in beside.items() if t is not None and t.ndim > 1 and any(t.shape[1] == x.shape[1] for x in inputs)]


def _begun(embedded: Tensor) -> Tensor:
    """What an embedding puts out, as the begin of the graph, and as a copy that may be written into."""
    return embedded.detach().requires_grad_().clone() if torch.is_grad_enabled() else embedded


def _differentiable(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def _forward(model: nn.Module, batch: Batch, capture: Capture, loss: Loss | None) -> Tensor:
    capture.gate = True
    try:
        with torch.set_grad_enabled(loss is not None):
            logits = logits_of(batch.run(model))
            capture.gate = False
            if loss is not None:
                total = loss(logits, batch.labels)
                if total.requires_grad:
                    total.backward()
    finally:
        capture.gate = False
    return logits.detach()
