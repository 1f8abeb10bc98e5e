"""Cost estimates of the pass over units and of the geometry of a language model."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from nodelens.analysis.geometry.analyze_model import forward_options
from nodelens.analysis.geometry.columns import MetricSelection, columns_of
from nodelens.analysis.geometry.sites import SeenTensors, hook_points, merged, pairs, unique
from nodelens.engine.covariance import LIMIT, CovariancePolicy
from nodelens.engine.driver import device_of
from nodelens.engine.dry_run import DryRun, with_groups
from nodelens.engine.options import AnalyzeOptions
from nodelens.engine.plan import Plan
from nodelens.engine.request import Layers, Metrics, as_layers, as_metrics
from nodelens.engine.validation import find_members, in_bytes
from nodelens.messages import keywords_of, kind_of
from nodelens.network.batch import Batch
from nodelens.network.hooks import Capture, Site
from nodelens.network.objective import Objective

from .estimate import CostEstimate, Machine, estimate_plan
from .meta_device import model_from_config, token_batch


@torch.inference_mode(False)
def estimate_cost(
    model: Any,
    metrics: Metrics = "default",
    layers: Layers = "*",
    *,
    batch: Any = None,
    samples: int = 16,
    length: int = 256,
    rows: int = 100_000,
    machine: Machine | None = None,
    initial: bool = False,
    **options: Any,
) -> CostEstimate:
    """Estimates the cost of ``nl.analyze`` from shapes alone, on the meta device, without weights or data.

    model:   a transformers config of a causal language model, or any network, such as one from ``meta_model``
    batch:   a batch in any form that ``nl.analyze`` takes, of the size to come, on any device; None: ``samples`` texts of
             ``length`` tokens. Two of its samples are run
    rows:    number of tokens to read; for images, number of samples
    machine: the machine it will run on; initial: whether the weights before training will be given
    options: those of ``nl.analyze``, by name, as ``AnalyzeOptions`` lists them

    A plan that ``nl.analyze`` would refuse for its size is estimated too, with the reason in ``refused``. Raises ValueError as it
    does, with a RuntimeError as the cause if the model's forward reads values, which the meta device does not have; TypeError for
    an unknown option.
    """
    settings = AnalyzeOptions().with_named(options, "nl.estimate_cost", keywords_of(estimate_cost))
    _check_arguments(model, metrics, batch)
    chosen = as_metrics(metrics)
    net = model if isinstance(model, nn.Module) else model_from_config(model)
    objective = Objective.of(net, settings.output, settings.task, settings.loss)
    if batch is not None:
        objective = objective.settled(net, batch)
    given = token_batch(samples, length, device_of(net)) if batch is None else batch
    batch = objective.batch(given, settings.groups).to(device_of(net))
    start = net.state_dict() if initial else None
    found = as_layers(net, layers, start)
    members = find_members(net, found, chosen, start)
    dry_run = with_groups(DryRun.of(net, members.observed(found), batch, optional=layers == "*"), members)
    plan_of = partial(
        Plan.of,
        net,
        found,
        chosen,
        dry_run,
        settings.groups,
        settings.positions,
        layers == "*",
        settings.precision,
        settings.pairs,
        ["label"],
        members=members,
    )
    plan, refused = _planned(plan_of, settings.covariance, settings.width, settings.max_passes)
    limits = in_bytes(settings.budget), settings.max_passes
    return estimate_plan(net, plan, rows, _tokens(batch, dry_run), machine or Machine(), *limits, refused=refused)


def _check_arguments(model: Any, metrics: Any, batch: Any) -> None:
    """Raises TypeError for a model that is none, and for data in the place of the metrics; ValueError without a batch."""
    if not isinstance(model, nn.Module) and not hasattr(model, "_attn_implementation"):
        way = "the model comes first" if isinstance(metrics, nn.Module) else "such as one of from_pretrained(...)"
        raise TypeError(f"nl.estimate_cost takes a network or a config of transformers, not {kind_of(model)}: {way}")
    items = metrics if isinstance(metrics, (list, tuple)) else []
    if isinstance(metrics, (Tensor, Dataset, DataLoader)) or any(isinstance(item, (Tensor, tuple, dict)) for item in items):
        raise TypeError("nl.estimate_cost reads no data: give one batch of the size to come, batch=, and their number, rows=")
    if batch is None and isinstance(model, nn.Module) and "input_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{type(model).__name__} takes no token ids: give one batch of the size to come, batch=")


@torch.inference_mode(False)
def estimate_geometry_cost(
    model: Any,
    *,
    layers: str | Sequence[int] = "all",
    hook_point: str | Sequence[str] = "residual_input",
    metrics: MetricSelection = "default",
    diagnostics: str | Sequence[str] | None = None,
    sample_limit: int | None = 512,
    novelty_k: int = 32,
    max_tokens: int | None = 100_000,
    samples: int = 16,
    length: int = 256,
    machine: Machine | None = None,
    budget: float | None = None,
    max_passes: int = 1,
    covariance: str | None = None,
    width: int = LIMIT,
) -> CostEstimate:
    """Estimates the cost of ``nl.analyze_model`` from shapes alone; ``model`` as in ``estimate_cost``, the rest as in the call.

    Counts of routers are not included. Raises ValueError as ``estimate_cost`` does, and if ``max_tokens`` is None.
    """
    if max_tokens is None:
        raise ValueError("max_tokens is null: the cost depends on the number of tokens, so give a number")
    net = model if isinstance(model, nn.Module) else model_from_config(model)
    requested = [diagnostics] if isinstance(diagnostics, str) else list(diagnostics or ())
    columns = columns_of(metrics, requested, novelty_k, sample_limit is not None)
    points = hook_points(net, hook_point, layers)
    device = device_of(net)
    batch = token_batch(samples, length, device) | {k: v for k, v in forward_options(net, points).items() if k == "logits_to_keep"}
    del batch["labels"]
    seen = SeenTensors()
    capture = Capture([Site(layer, "output") for layer in unique(points)], seen.see)
    capture.gate = True
    with capture:
        dry_run = DryRun.of(net, unique(points), Batch.of(batch))
    points = merged(points, seen.duplicates())
    plan_of = partial(Plan.of, net, unique(points), columns.summed, dry_run, groups=1, pairs=pairs(points))
    plan, refused = _planned(plan_of, covariance, width, max_passes)
    sample = 4 * (sample_limit or 0) if columns.sampled else 0
    extra = {layer.name: sample * plan.seen(layer, "output").width for layer in plan.layers}
    return estimate_plan(net, plan, max_tokens, length, machine or Machine(), budget, max_passes, extra, refused)


def _planned(plan_of: Callable[..., Plan], covariance: str | None, width: int, passes: int) -> tuple[Plan, list[str]]:
    """The plan; for sites that are too wide, the plan with full covariances and the reason why it would be refused."""
    try:
        return plan_of(covariance=CovariancePolicy.of(covariance, width, 0, passes)), []
    except ValueError as error:
        if covariance is not None:
            raise
        return plan_of(covariance=CovariancePolicy("full")), [str(error)]


def _tokens(batch: Batch, dry_run: DryRun) -> int:
    """Number of rows per sample: its tokens if each has logits, else one."""
    inputs = next(t for t in (*batch.args, *batch.kwargs.values()) if isinstance(t, torch.Tensor))
    return inputs.shape[1] if dry_run.tokens else 1
