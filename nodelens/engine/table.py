"""The tables of a pass: one row per unit and one column per metric, followed by its standard error."""

import math
from collections.abc import Iterator
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
from nodelens.network.sharded import class_name
from nodelens.statistics import kernels

from .error_reasons import no_error, why_missing
from .estimate import Estimator, estimators_at, evaluate
from .layout import REDUCTIONS, Place
from .members import side_of
from .metric_sums import SampleCounts, Sums
from .permutation import null_of
from .plan import Plan
from .wide_sites import KnownUnits


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


@dataclass
class _Cell:
    """One metric at one layer or pair of layers of the table."""

    name: str
    place: Place
    estimators: list[Estimator]


def make_table(plan: Plan, sums: Sums, samples: SampleCounts, bias: bool = False, seed: int = 0) -> Table:
    """Evaluates every metric at every place of a plan from complete sums; the samples of each group weight the jackknife."""
    of_layers, of_pairs = _cells(plan, sums, samples)
    evaluate(plan, [each for cell in _in_order(plan, of_layers, of_pairs) for each in cell.estimators], samples)
    table, frames, rows = Table(pd.DataFrame(), pd.DataFrame(), pd.DataFrame(), {}), [], []
    for layer in plan.measured:
        width = plan.seen(layer, "output").width
        columns: dict[str, np.ndarray] = {}
        kind = layer.group.kind if isinstance(layer, GroupLayer) else class_name(layer.module)
        row: dict[str, Any] = {"layer": layer.title, "type": kind, "units": width}
        for cell in of_layers[layer.name]:
            metric = plan.metrics[cell.name]
            found = _measured(metric, plan, cell, bias, seed)
            _note(table, layer.title, cell.name, metric, found, plan, cell.place)
            _store(table, columns, row, cell.name, metric, found)
        frames.append(pd.DataFrame(columns, index=range(width)))
        rows.append(row)
    for cell in of_layers.get(plan.stack.name, ()) if plan.stack is not None else ():
        metric = plan.metrics[cell.name]
        found = _measured(metric, plan, cell, bias, seed)
        _note(table, plan.stack.title, cell.name, metric, found, plan, cell.place)  # type: ignore[union-attr]
        _store(table, {}, {"layer": plan.stack.title}, cell.name, metric, found)  # type: ignore[union-attr]
    table.units, table.layers = pd.concat(frames), pd.DataFrame(rows).set_index("layer")
    titles = table.layers.index.repeat(table.layers["units"].to_numpy())
    table.units.index = pd.MultiIndex.from_arrays([titles, table.units.index], names=["layer", "unit"])
    table.edges = _edges(table, plan, of_pairs, bias, seed)
    table.model = of_model(plan, table.layers)
    return table


def _cells(plan: Plan, sums: Sums, samples: SampleCounts) -> tuple[dict[str, list[_Cell]], dict[Place, list[_Cell]]]:
    """The cells of each layer, by name, and of each pair of layers."""
    of_layers: dict[str, list[_Cell]] = {layer.name: [] for layer in plan.measured}
    of_pairs: dict[Place, list[_Cell]] = {pair: [] for pair in plan.pairs if pair[0] in plan.measured}
    for name, metric in plan.metrics.items():
        places: Any = of_pairs if metric.kind == "edge" else [(layer, plan.behind(metric, layer)) for layer in plan.measured]
        places = [*places, (plan.stack, None)] if plan.stacks(metric) else places
        for place in places:
            cell = _Cell(name, place, estimators_at(metric, plan, _places(metric, plan, place), sums, samples))
            (of_pairs[place] if metric.kind == "edge" else of_layers.setdefault(place[0].name, [])).append(cell)
    return of_layers, of_pairs


def _in_order(plan: Plan, of_layers: dict[str, list[_Cell]], of_pairs: dict[Place, list[_Cell]]) -> Iterator[_Cell]:
    """All cells: pairs in order of their later layer, each followed by its layers, so that few sums are held at once.

    Pairs come first, because some read eigenvectors, and metrics of layers then read the eigenvalues that came with them.
    """
    order = {layer: k for k, layer in enumerate(plan.layers)}
    left = dict(of_layers)
    for pair in sorted(of_pairs, key=lambda pair: max(order[layer] for layer in pair if layer in order)):
        yield from of_pairs[pair]
        for layer in sorted((layer for layer in pair if layer in order), key=order.__getitem__):
            yield from left.pop(layer.name, ())
    for cells in left.values():
        yield from cells


def _places(metric: Metric, plan: Plan, place: Place) -> list[Place]:
    """The places whose values are combined into one: several only for a pruning group that several layers read or make."""
    layer, behind = place
    if metric.kind == "edge":
        return [place]
    if isinstance(layer, GroupLayer) and side_of(metric) != "group":
        return [(part, plan.behind(metric, part)) for part in plan.parts(metric, layer)]
    return [(plan.parts(metric, layer)[0], behind)]


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


def _edges(table: Table, plan: Plan, of_pairs: dict[Place, list[_Cell]], bias: bool, seed: int) -> pd.DataFrame:
    rows = []
    for (first, second), cells in of_pairs.items() if any(of_pairs.values()) else ():
        row: dict[str, Any] = {"layer": first.name, "next": second.name}  # type: ignore[union-attr]
        views: set[str] = set()
        for cell in cells:
            metric = plan.metrics[cell.name]
            found = _measured(metric, plan, cell, bias, seed)
            views |= {need.view for _, need in plan.wanted(metric, cell.place).values()}
            row |= {cell.name + suffix: float(value) for suffix, value in found.columns.items()}
            _note(table, f"{first.name} -> {second.name}", cell.name, metric, found, plan, cell.place)  # type: ignore[union-attr]
        rows.append(row | {"view": "+".join(sorted(views))})
    return pd.DataFrame(rows, columns=None if rows else ["layer", "next"]).set_index(["layer", "next"])


def of_model(plan: Plan, layers: pd.DataFrame) -> dict[str, float]:
    """Totals over all layers, for metrics that define one."""
    sizes = [0 if layer.shape is None else layer.shape.numel() for layer in plan.measured]
    found = {}
    for name, metric in plan.metrics.items():
        if metric.shape == "layer" and hasattr(metric, "of_model"):
            values = [torch.tensor(v, dtype=torch.float64) for v in layers[name]]
            found[name] = float(metric.of_model(values, sizes))
    return found


def measure(metric: Metric, plan: Plan, place: Place, sums: Sums, samples: SampleCounts) -> Measured:
    """A metric at one place, with its standard error unless it reads weights only or gives a matrix of pairs."""
    cell = _Cell(metric.names[0], place, estimators_at(metric, plan, _places(metric, plan, place), sums, samples))
    evaluate(plan, cell.estimators, samples)
    return _measured(metric, plan, cell)


def _measured(metric: Metric, plan: Plan, cell: _Cell, bias: bool = False, seed: int = 0) -> Measured:
    """The columns of an evaluated cell. Values of the layers of a pruning group are combined, without each group alike."""
    layer, estimators = cell.place[0], cell.estimators
    reason = next((each.reason for each in estimators if each.reason), "")
    if reason:
        return _missing_value(plan, metric, layer, reason, bias)
    value, replicates, counts, known = _combined(plan, metric, layer, estimators)
    counted, errors = estimators[0].counted, estimators[0].errors
    columns, why = {"": value}, no_error(metric, counts, counted) if errors else ""
    if errors and replicates is None:
        columns["_se"] = torch.full_like(value, math.nan)
    elif replicates is not None:
        columns["_se"], bias_estimate = jackknife(value, replicates, counted[counted > 0])
        columns["_se"] = columns["_se"].where(torch.tensor(not why), math.nan)
        columns |= {"_bias": bias_estimate} if bias else {}
    columns |= estimators[0].beside
    if metric.options.get("permutations"):
        with kernels.using(plan.kernels):
            columns |= null_of(metric, *estimators[0].for_null(), seed)
    return _scatter(Measured(columns, counts, known=known, no_error=why), plan, metric, layer)


def _combined(
    plan: Plan, metric: Metric, layer: Layer, estimators: list[Estimator]
) -> tuple[Tensor, Tensor | None, dict[str, int], KnownUnits]:
    """Value, replicates, counts and known units of a cell."""
    if not (isinstance(layer, GroupLayer) and side_of(metric) != "group"):
        only = estimators[0]
        return only.values[None], only.replicates, only.counts, only.known
    indexed, combine = plan.members.of(layer, side_of(metric)), REDUCTIONS[plan.reduce]
    value, left = [], []
    for each, (part, places) in zip(estimators, indexed, strict=True):
        width = plan.seen(part, "output").width
        value.append(each.at(each.values[None], places, width))
        if each.replicates is not None:
            left.append(each.at(each.replicates, places, width))
    counts = {k: sum(each.counts.get(k, 0) for each in estimators) for each in estimators for k in each.counts}
    replicates = combine(torch.cat(left, -1)) if len(left) == len(value) else None
    return combine(torch.cat(value, -1)), replicates, counts, KnownUnits()


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
