"""One pass over the data, and what it found."""

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
from .narrow import describe as describe_covariance
from .options import AnalyzeOptions
from .plan import Plan
from .request import Layers, Metrics, as_layers, as_metrics, describe, names_of, targets_of
from .several_passes import check_again, divided, joined
from .table import make_table
from .validation import find_members

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
    """Measures the units of a model in one pass over the data, in eval mode, on the device where its parameters lie.

    data:     batches, each a tensor, an (x, y) pair or a dict (input_ids, attention_mask, labels, ids); under a process group
              each process gives its own share. None: for metrics of weights
    metrics:  names, metric objects, or {column: metric}
    layers:   a name, a glob, a role, a list of them, or pruning groups
    initial:  the network before training, or its state dict, for metrics of the weights' change
    options:  ``AnalyzeOptions``; each of its fields can be given by name as well, as in ``groups=16``
    on_plan:  called with the plan before the data are read
    progress: wraps the batches of each pass, for a progress bar

    Raises ValueError for names without a match, data that do not fit the model, and labels that a metric needs and the data
    lack; MemoryError over the budget; TypeError for an unknown option.
    """
    started = time.perf_counter()
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
    of_weights = data is None or (not reads and all(isinstance(layer, GroupLayer) for layer in found))
    batches = iter(() if of_weights else data)  # type: ignore[arg-type]
    head = next(batches, None)
    first = None if head is None else Batch.of(head, groups, seed).to(device)
    shown = members.observed(found)
    seen = first_of(None if first is None else (DryRun.of(model, shown, first), _per_token(first)))
    seen = (DryRun.of_weights(shown), []) if of_weights else seen
    if seen is None:
        raise ValueError("the data are empty: not one batch to measure")
    dry_run, per_token = seen
    beyond = CovariancePolicy.of(settings.covariance, settings.width, seed, settings.max_passes)
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
        beyond,
        members,
        seed,
        settings.reduce,
    )
    parts = divided(plan, settings.budget, settings.max_passes)
    again = plan.rounds > 1
    check_again(batches is data, len(parts) + plan.rounds - 1, device)
    source: Any = () if of_weights else data
    if on_plan:
        on_plan(plan)
    planned = time.perf_counter()
    every = [] if head is None else itertools.chain([head], batches)
    seconds = {"plan": planned - started, "pass": 0.0, "table": 0.0}
    results: list[Result] = []
    for part in parts:
        begun = time.perf_counter()
        taken = run_pass(model, part, source if results or again else every, seed, settings.loss, progress)
        passed = time.perf_counter()
        results.append(finish(part, taken, device, settings.bias, seed))
        del taken  # its sums make room for the next pass's
        seconds["pass"] += passed - begun
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
    """Shows every batch to the plan's statistics. The model is as before when it ends, however it ends."""
    taken, device = Pass(plan, seed), device_of(model)
    weights = list({id(p): p for sums in taken.model_sums for p in sums.parameters}.values())
    graph = plan.gradients or bool(weights)
    early = graph and bool(plan.overwritten)  # a graph that begins at a layer would not survive what is done in place
    first = [module for module in model.modules() if early and isinstance(module, nn.Embedding)]
    for k in range(taken.rounds):
        taken.begin_round(k)
        sites = taken.sites(k)
        runs = bool(sites) or any(sums.forward for sums in taken.model_sums) or not taken.model_sums
        capture = Capture(sites, taken.see, plan.overwritten)
        with eval_mode(model), differentiable(weights), edit(dict.fromkeys(first, _begun)), capture:
            for given in progress(data):
                batch = Batch.of(given, plan.groups, seed).sorted().to(device)
                if early:
                    named = {k: _differentiable(v) for k, v in batch.kwargs.items()}
                    batch = replace(batch, args=tuple(map(_differentiable, batch.args)), kwargs=named)
                taken.begin(batch)
                taken.end(_forward(model, batch, capture, loss if graph else None, bool(weights)) if runs else None, loss)
                for tensor in weights:
                    tensor.grad = None
    taken.flush()
    return taken


def finish(plan: Plan, taken: Pass, device: torch.device, bias: bool = False, seed: int = 0) -> Result:
    """The result of a pass; under a process group of all processes' passes together. Collective."""
    sums = taken.sums()
    reduce_sums({key: a for key, a in sums.items() if isinstance(a, Accumulator)}, device)
    for total in taken.model_sums:
        total.reduce()
    samples = reduce_tensor(taken.samples.to(device)).cpu()
    left_out = reduce_tensor(torch.tensor([c.left_out for c in taken.collectors.values()], device=device)).tolist()
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
        "left_out": [{"site": str(s), "rows": n} for s, n in zip(taken.collectors, left_out, strict=True) if n],
        "never_called": plan.never_called,
        "outputs": [la.title for la in plan.layers if plan.seen(la, "output").final],
        "plan": {"statistics": plan.rows(), "bytes": plan.total_bytes, "estimated_overhead": plan.overhead()},
        "passes": [{"layers": [la.title for la in plan.measured], "bytes": plan.total_bytes}],
        "covariance": describe_covariance(plan),
    }
    return Result(table.units, table.layers, table.matrices, metadata, table.edges)


def _rows_of(value: Any) -> int:
    """Rows that a statistic saw."""
    counted = value.tensors() if isinstance(value, Statistic) else {}
    return int(counted["n" if "n" in counted else "seen"].sum()) if counted else 0


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
