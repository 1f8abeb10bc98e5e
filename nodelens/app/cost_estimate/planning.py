"""Forecasts of the passes that there are: of units, and of the geometry of a language model."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from nodelens.analysis.geometry.analyze_model import takes
from nodelens.analysis.geometry.columns import Asked, columns_of
from nodelens.analysis.geometry.sites import Shown, hook_points, merged, pairs, unique
from nodelens.engine.analyze import DEFAULT, Metrics, device_of
from nodelens.engine.covariance import LIMIT, CovariancePolicy
from nodelens.engine.dry_run import DryRun
from nodelens.engine.plan import Plan
from nodelens.engine.request import as_metrics
from nodelens.network.batch import Batch
from nodelens.network.find_layers import find_layers
from nodelens.network.hooks import Capture, Site

from .estimate import Forecast, Machine, report
from .hollow import of_config, token_batch


@torch.inference_mode(False)
def forecast(
    model: Any,
    metrics: Metrics = DEFAULT,
    layers: str | Sequence[str] = "*",
    *,
    batch: Any = None,
    samples: int = 16,
    length: int = 256,
    rows: int = 100_000,
    machine: Machine | None = None,
    budget: float | None = None,
    max_passes: int = 1,
    covariance: str | None = None,
    width: int = LIMIT,
    groups: int = 8,
    positions: int | None = None,
    precision: str = "float32",
    pairs: str | Sequence[Sequence[str]] = "consecutive",
    initial: bool = False,
) -> Forecast:
    """What ``nl.analyze`` will take, of shapes alone: on the meta device neither weights nor data take memory or time.

    model:   a config of transformers' causal language models, or any network, such as one that ``hollow`` made
    batch:   of any form that ``nl.analyze`` takes, on the network's device, one of those to come in size; None: ``samples`` texts
             of ``length`` tokens. Two of its samples are run
    rows:    tokens to be read, of images samples
    machine: what it will run on; initial: whether the weights before training will be known
    All others are those of ``nl.analyze``; what it would refuse for its bytes is forecast all the same, and says so. Raises
    ValueError as it does; with a RuntimeError as its cause where the model's forward asks for values that the meta device has not.
    """
    net = model if isinstance(model, nn.Module) else of_config(model)
    batch = Batch.of(token_batch(samples, length, device_of(net)) if batch is None else batch, groups)
    found = find_layers(net, layers, net.state_dict() if initial else None)
    dry_run = DryRun.of(net, found, batch)
    chosen: Mapping[str, Any] = as_metrics(metrics)
    plan_of = partial(Plan.of, net, found, chosen, dry_run, groups, positions, layers == "*", precision, pairs, ["label"])
    plan, refused = _planned(plan_of, covariance, width, max_passes)
    return report(net, plan, rows, _tokens(batch, dry_run), machine or Machine(), budget, max_passes, refused=refused)


@torch.inference_mode(False)
def forecast_geometry(
    model: Any,
    *,
    layers: str | Sequence[int] = "all",
    hook_point: str | Sequence[str] = "residual_input",
    metrics: Asked = "default",
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
) -> Forecast:
    """What ``nl.analyze_model`` will take, of shapes alone; ``model`` as in ``forecast``, all else as it takes it.

    The counts of routers are not in it. Raises ValueError as ``forecast`` does, and for a pass without ``max_tokens``.
    """
    if max_tokens is None:
        raise ValueError("max_tokens is null: how long it takes depends on how many tokens are read, give a number")
    net = model if isinstance(model, nn.Module) else of_config(model)
    asked = [diagnostics] if isinstance(diagnostics, str) else list(diagnostics or ())
    columns = columns_of(metrics, asked, novelty_k, sample_limit is not None)
    points = hook_points(net, hook_point, layers)
    device = device_of(net)
    batch = token_batch(samples, length, device) | {k: v for k, v in takes(net, points).items() if k == "logits_to_keep"}
    del batch["labels"]
    shown = Shown()
    capture = Capture([Site(layer, "output") for layer in unique(points)], shown.see)
    capture.gate = True
    with capture:
        dry_run = DryRun.of(net, unique(points), Batch.of(batch))
    points = merged(points, shown.same())
    plan_of = partial(Plan.of, net, unique(points), columns.summed, dry_run, groups=1, pairs=pairs(points))
    plan, refused = _planned(plan_of, covariance, width, max_passes)
    sample = 4 * (sample_limit or 0) if columns.sampled else 0
    extra = {layer.name: sample * plan.seen(layer, "output").width for layer in plan.layers}
    return report(net, plan, max_tokens, length, machine or Machine(), budget, max_passes, extra, refused)


def _planned(plan_of: Callable[..., Plan], covariance: str | None, width: int, passes: int) -> tuple[Plan, list[str]]:
    """The plan; where sites are too wide for it that of the full covariances, and why it would be refused."""
    try:
        return plan_of(covariance=CovariancePolicy.of(covariance, width, 0, passes)), []
    except ValueError as error:
        if covariance is not None:
            raise
        return plan_of(covariance=CovariancePolicy("full")), [str(error)]


def _tokens(batch: Batch, dry_run: DryRun) -> int:
    """Rows of a sample: its tokens where each has logits of its own, else one."""
    inputs = next(t for t in (*batch.args, *batch.kwargs.values()) if isinstance(t, torch.Tensor))
    return inputs.shape[1] if dry_run.tokens else 1
