"""The tables of a pass: one row per unit and one column per metric, followed by its standard error."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from nodelens.metrics import Metric
from nodelens.metrics.sampling import jackknife
from nodelens.network.group_layer import GroupLayer
from nodelens.network.layers import Layer

from .error_reasons import no_error, why_missing
from .layout import Place
from .members import side_of
from .metric_sums import MetricSums, SampleCounts, Sums
from .permutation import null_of
from .plan import Plan
from .wide_sites import KnownUnits, known_units, reason_left_out


@dataclass
class Table:
    """All results of a pass: tables of units, layers and layer pairs, pair matrices, and notes."""

    units: pd.DataFrame
    layers: pd.DataFrame
    edges: pd.DataFrame
    matrices: dict[tuple[str, str], np.ndarray]
    missing: list[dict[str, Any]] = field(default_factory=list)  # how many values are NaN, where and why
    counts: list[dict[str, Any]] = field(default_factory=list)  # how often a rule for an edge case was used
    model: dict[str, float] = field(default_factory=dict)  # totals over all layers


@dataclass(frozen=True)
class Measured:
    """A metric's values at a place by column suffix: '', _se, and _bias, _null, _p on request."""

    columns: dict[str, Tensor]
    counts: dict[str, int] = field(default_factory=dict)
    reason: str = ""  # why all values are NaN, if the place is the cause
    known: KnownUnits = field(default_factory=KnownUnits)  # units with values at a site that is too wide
    no_error: str = ""  # why the jackknife is not the error of the value

    @property
    def value(self) -> Tensor:
        return self.columns[""]


def make_table(plan: Plan, sums: Sums, samples: SampleCounts, bias: bool = False, seed: int = 0) -> Table:
    """Evaluates every metric at every place of a plan from complete sums; the samples of each group weight the jackknife."""
    table, frames, rows = Table(pd.DataFrame(), pd.DataFrame(), pd.DataFrame(), {}), [], []
    for layer in plan.measured:
        width = plan.seen(layer, "output").width
        index = pd.MultiIndex.from_product([[layer.title], range(width)], names=["layer", "unit"])
        columns: dict[str, np.ndarray] = {}
        kind = layer.group.kind if isinstance(layer, GroupLayer) else type(layer.module).__name__
        row: dict[str, Any] = {"layer": layer.title, "type": kind, "units": width}
        for name, metric in plan.metrics.items():
            if metric.kind != "edge":
                place = layer, plan.behind(metric, layer)
                found = measure(metric, plan, place, sums, samples, bias, seed)
                _note(table, layer.title, name, metric, found, plan, place)
                _store(table, columns, row, name, metric, found)
        frames.append(pd.DataFrame(columns, index=index))
        rows.append(row)
    table.units = pd.concat(frames)
    table.layers = pd.DataFrame(rows).set_index("layer")
    table.edges = _edges(table, plan, sums, samples, bias, seed)
    table.model = of_model(plan, table.layers)
    return table


def _store(table: Table, columns: dict, row: dict, name: str, metric: Metric, found: Measured) -> None:
    """Stores values in the table that their shape belongs to."""
    for suffix, value in found.columns.items():
        if metric.shape in ("pair", "input"):
            if value.ndim:  # a scalar NaN stands for a matrix that was left out
                table.matrices[row["layer"], name + suffix] = value.numpy()
        elif metric.shape == "layer":
            row[name + suffix] = float(value)
        else:
            columns[name + suffix] = value.numpy()


def _edges(table: Table, plan: Plan, sums: Sums, samples: SampleCounts, bias: bool, seed: int) -> pd.DataFrame:
    chosen = {name: metric for name, metric in plan.metrics.items() if metric.kind == "edge"}
    rows = []
    for place in [pair for pair in plan.pairs if pair[0] in plan.measured] if chosen else ():
        first, second = place
        row: dict[str, Any] = {"layer": first.name, "next": second.name}
        views: set[str] = set()
        for name, metric in chosen.items():
            found = measure(metric, plan, place, sums, samples, bias, seed)
            views |= {need.view for _, need in plan.wanted(metric, place).values()}
            row |= {name + suffix: float(value) for suffix, value in found.columns.items()}
            _note(table, f"{first.name} -> {second.name}", name, metric, found, plan, place)
        rows.append(row | {"view": "+".join(sorted(views))})
    return pd.DataFrame(rows, columns=None if rows else ["layer", "next"]).set_index(["layer", "next"])


def of_model(plan: Plan, layers: pd.DataFrame) -> dict[str, float]:
    """Totals over all layers, for metrics that define one."""
    sizes = [0 if layer.tensor is None else layer.tensor.numel() for layer in plan.measured]
    found = {}
    for name, metric in plan.metrics.items():
        if metric.shape == "layer" and hasattr(metric, "of_model"):
            values = [torch.tensor(v, dtype=torch.float64) for v in layers[name]]
            found[name] = float(metric.of_model(values, sizes))
    return found


def measure(
    metric: Metric, plan: Plan, place: Place, sums: Sums, samples: SampleCounts, bias: bool = False, seed: int = 0
) -> Measured:
    """A metric at a place, with its standard error unless it reads weights only or gives a matrix of pairs.

    For a pruning group, the values of its layers are combined, in the value and in each jackknife replicate alike.
    """
    layer = place[0]
    if isinstance(layer, GroupLayer) and side_of(metric) != "group":
        indexed = plan.members.of(layer, side_of(metric))
        read = [MetricSums.at(metric, plan, (part, plan.behind(metric, part)), sums) for part, _ in indexed]
        counted = torch.stack([one.samples(samples) for one in read]).amin(0)  # the same groups at every part
        parts = [_estimate(one, counted, samples) for one in read]
        found = _combine([each.at(places, plan, part) for each, (part, places) in zip(parts, indexed, strict=True)], plan.reduce)
    else:
        at = layer if metric.kind == "edge" else plan.parts(metric, layer)[0]
        one = MetricSums.at(metric, plan, (at, place[1]), sums)
        counted = one.samples(samples)
        found = _estimate(one, counted, samples)
    if found.reason:
        return _missing_value(plan, metric, layer, found.reason, bias)
    columns, reason = {"": found.value}, no_error(metric, found.counts, counted) if found.errors else ""
    if found.errors and found.replicates is None:
        columns["_se"] = torch.full_like(found.value, math.nan)
    elif found.replicates is not None:
        columns["_se"], bias_estimate = jackknife(found.value, found.replicates, counted[counted > 0])
        columns["_se"] = columns["_se"].where(torch.tensor(not reason), math.nan)
        columns |= {"_bias": bias_estimate} if bias else {}
    if found.null and metric.options.get("permutations"):
        weight, needs, statistics = found.null
        columns |= null_of(metric, weight, needs, statistics, seed)
    return _scatter(Measured(columns, found.counts, known=found.known, no_error=reason), plan, metric, layer)


@dataclass(frozen=True)
class _Estimate:
    """A metric's value at one place, and its jackknife replicates, each without one group of samples, (groups, ...)."""

    value: Tensor = field(default_factory=lambda: torch.empty(0))
    replicates: Tensor | None = None
    errors: bool = False  # whether the metric has standard errors
    counts: dict[str, int] = field(default_factory=dict)
    known: KnownUnits = field(default_factory=KnownUnits)
    null: tuple[Any, ...] = ()  # weight, needs and statistics, for the permutation test
    reason: str = ""  # why there is no value

    def at(self, places: Tensor, plan: Plan, layer: Layer) -> "_Estimate":
        """The values gathered at an index (units, places) of the layer's units."""
        if self.reason:
            return self
        width = plan.seen(layer, "output").width

        def placed(value: Tensor) -> Tensor:
            if self.known.units is not None:
                value = value.new_full((*value.shape[:-1], width), math.nan).index_copy(-1, self.known.units, value)
            return value[..., places]

        replicates = None if self.replicates is None else placed(self.replicates)
        return replace(self, value=placed(self.value), replicates=replicates, known=KnownUnits())


_REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(-1),
    "mean": lambda x: x.mean(-1),
    "max": lambda x: x.amax(-1),
    "prod": lambda x: x.prod(-1),
    "first": lambda x: x[..., 0],
}


def _combine(parts: list[_Estimate], reduce: str) -> _Estimate:
    """Combines several layers' values into one value per unit of a group."""
    missing = next((part for part in parts if part.reason), None)
    if missing is not None:
        return missing
    value = _REDUCE[reduce](torch.cat([part.value for part in parts], -1))
    replicate_parts = [part.replicates for part in parts if part.replicates is not None]
    replicates = _REDUCE[reduce](torch.cat(replicate_parts, -1)) if len(replicate_parts) == len(parts) else None
    counts = {k: sum(part.counts.get(k, 0) for part in parts) for part in parts for k in part.counts}
    return _Estimate(value, replicates, parts[0].errors, counts)


def _estimate(sums: MetricSums, counted: Tensor, samples: SampleCounts) -> _Estimate:
    """A metric's value at a place; counted (groups,) int64 says which groups of samples have rows."""
    metric, plan, (layer, _), resolved = sums.metric, sums.plan, sums.place, sums.resolved
    weight = plan.parameter(layer, metric)
    if metric.needs() and not resolved:
        wanted = plan.wanted(metric, sums.place)
        return _Estimate(
            reason=plan.unread(wanted) or plan.unpaired(wanted) or reason_left_out(plan, wanted) or "there is no next layer"
        )
    if metric.weighted and weight is None:
        return _Estimate(reason="no batch norm follows the layer")
    known = known_units(plan, layer, resolved)
    if isinstance(weight, Tensor):
        weight = known.weight(weight, all(need.port != "input" for _, need in resolved.values()))
    present = counted.nonzero().flatten().tolist()
    if metric.grouped:
        whole = {name: [values[g] for g in present] for name, values in sums.by_group(len(counted)).items()}
        return _Estimate(metric(weight, **whole), known=known)
    statistics = sums.whole()
    value, replicates = metric(weight, **statistics), None
    errors = bool(resolved) and metric.shape != "pair"
    if errors and not sums.single and len(present) > 1:
        replicates = torch.stack([metric(weight, **sums.without(g)) for g in present])
    null = (weight, {k: need for k, (_, need) in resolved.items()}, statistics) if resolved else ()
    counts = metric.counts(weight, **statistics) | sums.without_target(samples)
    return _Estimate(value, replicates, errors, counts, known, null)


def _scatter(found: Measured, plan: Plan, metric: Metric, layer: Layer) -> Measured:
    """Scatters the values of sampled units into the layer's width, NaN elsewhere; a matrix of pairs is unchanged."""
    side = _side(metric)
    ids = found.known.inputs if side == "input" else found.known.units
    if ids is None or metric.shape not in ("unit", "input"):
        return replace(found, known=KnownUnits())
    scattered = {
        suffix: value.new_full((plan.seen(layer, side).width,), math.nan).index_copy(0, ids, value)
        for suffix, value in found.columns.items()
    }
    return replace(found, columns=scattered, known=found.known._replace(units=ids))


def _missing_value(plan: Plan, metric: Metric, layer: Layer, reason: str, bias: bool) -> Measured:
    """NaN in the metric's shape and columns."""
    suffixes = ("",) if not metric.needs() or metric.shape == "pair" else ("", "_se", "_bias") if bias else ("", "_se")
    width = [] if metric.shape in ("layer", "edge", "pair") else [plan.seen(layer, _side(metric)).width]
    return Measured({s: torch.full(width, math.nan, dtype=torch.float64) for s in suffixes}, reason=reason)


def _side(metric: Metric) -> str:
    """The side of a layer whose units a metric has values for."""
    return "input" if metric.shape == "input" else "output"


def _note(table: Table, where: str, name: str, metric: Metric, found: Measured, plan: Plan, place: Place) -> None:
    """Notes why values are missing, and how often a rule was used."""
    table.counts += [{"layer": where, "metric": name, "rule": k, "count": v} for k, v in found.counts.items() if v]
    for suffix, value in found.columns.items():
        outside = 0 if found.known.units is None else len(value) - len(found.known.units)
        undefined = int(value.isnan().sum()) - outside
        if outside:
            table.missing.append({"layer": where, "column": name + suffix, "count": outside, "reason": found.known.reason})
        if not undefined:
            continue
        reason = found.reason or metric.nan
        if suffix in ("_se", "_bias") and not found.reason:
            ours = found.no_error if suffix == "_se" else ""
            reason = ours or why_missing(metric, plan, place, value, found.value, reason)
        table.missing.append({"layer": where, "column": name + suffix, "count": undefined, "reason": reason})
