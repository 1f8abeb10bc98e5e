"""The table of a pass: a row a unit, a column a metric, its standard error beside it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .layers import Layer
from .metrics import Metric, Need
from .plan import GROUPED_WIDTH, Plan
from .statistics import Accumulator, Gram, Statistic

Sums = Mapping[tuple[str, Need], Accumulator]


@dataclass
class Table:
    """What the metrics say of a model: units (layer, unit), layers, matrices of pairs, and how it came about."""

    units: pd.DataFrame
    layers: pd.DataFrame
    matrices: dict[tuple[str, str], np.ndarray]
    missing: list[dict[str, Any]] = field(default_factory=list)  # where there is no number, how many, and why
    counts: list[dict[str, Any]] = field(default_factory=list)  # how often a rule for an edge case was used


def make_table(plan: Plan, sums: Sums, samples: Tensor) -> Table:
    """Every metric at every layer of a plan, from complete sums; samples (groups,) int64 weigh the jackknife."""
    table, frames, rows = Table(pd.DataFrame(), pd.DataFrame(), {}), [], []
    for layer in plan.layers:
        units, row = _measure_layer(table, plan, layer, sums, samples)
        frames.append(units)
        rows.append(row)
    table.units = pd.concat(frames)
    table.layers = pd.DataFrame(rows).set_index("layer")
    return table


def _measure_layer(table: Table, plan: Plan, layer: Layer, sums: Sums, samples: Tensor) -> tuple[pd.DataFrame, dict]:
    width = plan.seen(layer, "output").width
    index = pd.MultiIndex.from_product([[layer.name], range(width)], names=["layer", "unit"])
    columns: dict[str, np.ndarray] = {}
    row: dict[str, Any] = {"layer": layer.name, "type": type(layer.module).__name__, "units": width}
    for name, metric in plan.metrics.items():
        value, error = measure(metric, plan, layer, sums, samples)
        if metric.shape == "pair":
            table.matrices[layer.name, name] = value.numpy()
        elif metric.shape == "layer":
            row[name] = float(value)
            row |= {} if error is None else {f"{name}_se": float(error)}
        else:
            columns[name] = value.numpy()
            columns |= {} if error is None else {f"{name}_se": error.numpy()}
        _explain(table, plan, layer, name, metric, value, error)
        statistics = _statistics(metric, plan, layer, sums)
        used = metric.counts(_weight(layer), **statistics)
        table.counts += [{"layer": layer.name, "metric": name, "rule": k, "count": v} for k, v in used.items() if v]
    return pd.DataFrame(columns, index=index), row


def measure(metric: Metric, plan: Plan, layer: Layer, sums: Sums, samples: Tensor) -> tuple[Tensor, Tensor | None]:
    """A metric's value at a layer and its standard error, None where no data are read or it is of pairs."""
    weight = _weight(layer)
    value = metric(weight, **_statistics(metric, plan, layer, sums))
    if not metric.needs() or metric.shape == "pair":
        return value, None
    held = [plan.lookup(layer, need)[0] for need in metric.needs().values()]
    present = [g for g, n in enumerate(samples.tolist()) if n]
    if any(plan.groups_of(layer, need) == 1 for need in held) or len(present) < 2:
        return value, torch.full_like(value, math.nan)
    left = [metric(weight, **_statistics(metric, plan, layer, sums, without=g)) for g in present]
    return value, jackknife(value, torch.stack(left), samples[present])


def jackknife(value: Tensor, left: Tensor, samples: Tensor) -> Tensor:
    """Standard error of a value from the values without each of G groups of samples, which may be unequal.

    Shapes: value (...), left (G, ...), samples (G,) -> (...)
    Source: Busing, Meijer & van der Leeden 1999, Statistics and Computing 9:3-8, eq. 3; equal groups give
            sqrt((G - 1)/G sum (left - mean)^2), Tukey 1958
    """
    shape = (-1, *[1] * value.ndim)
    h = (samples.sum() / samples.double()).reshape(shape)
    mean = len(left) * value - ((1 - 1 / h) * left).sum(0)
    pseudo = h * value - (h - 1) * left
    return ((pseudo - mean).square() / (h - 1)).mean(0).sqrt()


def _statistics(metric: Metric, plan: Plan, layer: Layer, sums: Sums, without: int | None = None) -> dict[str, Statistic]:
    found = {}
    for name, need in metric.needs().items():
        key, derived = plan.lookup(layer, need)
        accumulator = sums[layer.name, key]
        value = accumulator.value if without is None else accumulator.without(without)
        if value is None:
            raise ValueError(_nothing(metric, layer, need, without))
        found[name] = value.moments if derived and isinstance(value, Gram) else value
    return found


def _nothing(metric: Metric, layer: Layer, need: Need, without: int | None) -> str:
    if need.port == "output*grad":
        return (
            f"{metric.names[0]}: no gradient reached layer {layer.name!r}: the loss does not depend on it; leave the layer "
            "out (layers=)"
        )
    rest = "" if without is None else f" outside group {without}"
    return f"{metric.names[0]}: no rows were seen at layer {layer.name!r}{rest}: the data are empty, or the layer did not run"


def _explain(table: Table, plan: Plan, layer: Layer, name: str, metric: Metric, value: Tensor, error: Tensor | None) -> None:
    lost = int(value.isnan().sum())
    if lost:
        table.missing.append({"layer": layer.name, "column": name, "count": lost, "reason": metric.nan})
    if error is not None and int(error.isnan().sum()) > 0:
        wide = any(plan.groups_of(layer, plan.lookup(layer, need)[0]) == 1 for need in metric.needs().values())
        reason = (
            f"pair sums wider than {GROUPED_WIDTH} are kept once, not once a group"
            if wide and plan.groups > 1
            else "fewer than two groups of samples"
            if int((error.isnan() & ~value.isnan()).sum()) and plan.groups < 2
            else f"the value, or one without a group of samples, has none: {metric.nan}"
        )
        table.missing.append({"layer": layer.name, "column": f"{name}_se", "count": int(error.isnan().sum()), "reason": reason})


def _weight(layer: Layer) -> Tensor | None:
    weight = layer.weight
    return None if weight is None else weight.cpu()
