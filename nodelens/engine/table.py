"""The table of a pass: a row a unit, a column a metric, its standard error beside it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from nodelens.metrics import Metric, Need
from nodelens.metrics.sampling import jackknife
from nodelens.network.group_layer import GroupLayer
from nodelens.network.layers import Layer
from nodelens.statistics import Accumulator
from nodelens.statistics.costs import adapt

from .layout import GROUPED_WIDTH, Place
from .members import side_of
from .narrow import Kept, absent, kept
from .permutation import null_of
from .plan import Plan

Sums = Mapping[tuple[str, Need], Accumulator]


@dataclass
class Table:
    """What the metrics say of a model: units (layer, unit), layers, edges, matrices of pairs, and how it came about."""

    units: pd.DataFrame
    layers: pd.DataFrame
    edges: pd.DataFrame
    matrices: dict[tuple[str, str], np.ndarray]
    missing: list[dict[str, Any]] = field(default_factory=list)  # where there is no number, how many, and why
    counts: list[dict[str, Any]] = field(default_factory=list)  # how often a rule for an edge case was used
    model: dict[str, float] = field(default_factory=dict)  # of all layers together


@dataclass(frozen=True)
class Measured:
    """A metric's value at a place, by suffix of its column: '', _se, and where they were asked for _bias, _null, _p."""

    columns: dict[str, Tensor]
    counts: dict[str, int] = field(default_factory=dict)
    reason: str = ""  # of every NaN, where it is the place's and not the metric's
    kept: Kept = field(default_factory=Kept)  # the units that are known, of a layer too wide for all

    @property
    def value(self) -> Tensor:
        return self.columns[""]


def make_table(plan: Plan, sums: Sums, samples: Tensor, bias: bool = False, seed: int = 0) -> Table:
    """Every metric at every place of a plan, from complete sums; samples (groups,) int64 weigh the jackknife."""
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
                _put(table, columns, row, name, metric, found)
        frames.append(pd.DataFrame(columns, index=index))
        rows.append(row)
    table.units = pd.concat(frames)
    table.layers = pd.DataFrame(rows).set_index("layer")
    table.edges = _edges(table, plan, sums, samples, bias, seed)
    table.model = of_model(plan, table.layers)
    return table


def _put(table: Table, columns: dict, row: dict, name: str, metric: Metric, found: Measured) -> None:
    """Files a value where its shape belongs."""
    for suffix, value in found.columns.items():
        if metric.shape in ("pair", "input"):
            if value.ndim:  # no matrix of pairs where there are too many
                table.matrices[row["layer"], name + suffix] = value.numpy()
        elif metric.shape == "layer":
            row[name + suffix] = float(value)
        else:
            columns[name + suffix] = value.numpy()


def _edges(table: Table, plan: Plan, sums: Sums, samples: Tensor, bias: bool, seed: int) -> pd.DataFrame:
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
    """Totals over all layers of metrics that have one."""
    sizes = [0 if layer.tensor is None else layer.tensor.numel() for layer in plan.measured]
    found = {}
    for name, metric in plan.metrics.items():
        if metric.shape == "layer" and hasattr(metric, "of_model"):
            values = [torch.tensor(v, dtype=torch.float64) for v in layers[name]]
            found[name] = float(metric.of_model(values, sizes))
    return found


def measure(metric: Metric, plan: Plan, place: Place, sums: Sums, samples: Tensor, bias: bool = False, seed: int = 0) -> Measured:
    """A metric at a place, with its standard error where data are read and the value is not of pairs.

    Of a pruning group that is seen at several places, the values there are put together, in each replicate of the jackknife alike.
    """
    layer = place[0]
    if isinstance(layer, GroupLayer) and side_of(metric) != "group":
        shows = plan.members.of(layer, side_of(metric))
        every = [_replicates(metric, plan, (part, plan.behind(metric, part)), sums, samples) for part, _ in shows]
        found = _together([each.at(places, plan, part) for each, (part, places) in zip(every, shows, strict=True)], plan.reduce)
    else:
        at = layer if metric.kind == "edge" else plan.parts(metric, layer)[0]
        found = _replicates(metric, plan, (at, place[1]), sums, samples)
    if found.reason:
        return _absent(plan, metric, layer, found.reason, bias)
    columns = {"": found.value}
    if found.errors and found.left is None:
        columns["_se"] = torch.full_like(found.value, math.nan)
    elif found.left is not None:
        present = [g for g, n in enumerate(samples.tolist()) if n]
        columns["_se"], lean = jackknife(found.value, found.left, samples[present])
        columns |= {"_bias": lean} if bias else {}
    if found.null and metric.options.get("permutations"):
        weight, needs, statistics = found.null
        columns |= null_of(metric, weight, needs, statistics, seed)
    return _scattered(Measured(columns, found.counts, kept=found.kept), plan, metric, layer)


@dataclass(frozen=True)
class _Replicates:
    """A metric's value at one place, and without each group of samples, (groups, ...), where it has a standard error."""

    value: Tensor = field(default_factory=lambda: torch.empty(0))
    left: Tensor | None = None
    errors: bool = False  # whether the metric has standard errors
    counts: dict[str, int] = field(default_factory=dict)
    kept: Kept = field(default_factory=Kept)
    null: tuple[Any, ...] = ()  # weight, needs and statistics, for the permutation test
    reason: str = ""  # why there is no value

    def at(self, places: Tensor, plan: Plan, layer: Layer) -> "_Replicates":
        """Values at the places of a group's units, (units, places)."""
        if self.reason:
            return self
        width = plan.seen(layer, "output").width

        def placed(value: Tensor) -> Tensor:
            if self.kept.units is not None:
                value = value.new_full((*value.shape[:-1], width), math.nan).index_copy(-1, self.kept.units, value)
            return value[..., places]

        return replace(self, value=placed(self.value), left=None if self.left is None else placed(self.left), kept=Kept())


_REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(-1),
    "mean": lambda x: x.mean(-1),
    "max": lambda x: x.amax(-1),
    "prod": lambda x: x.prod(-1),
    "first": lambda x: x[..., 0],
}


def _together(parts: list[_Replicates], reduce: str) -> _Replicates:
    """One value per unit of a group, of its values at several places."""
    missing = next((part for part in parts if part.reason), None)
    if missing is not None:
        return missing
    value = _REDUCE[reduce](torch.cat([part.value for part in parts], -1))
    lefts = [part.left for part in parts if part.left is not None]
    left = _REDUCE[reduce](torch.cat(lefts, -1)) if len(lefts) == len(parts) else None
    counts = {k: sum(part.counts.get(k, 0) for part in parts) for part in parts for k in part.counts}
    return _Replicates(value, left, parts[0].errors, counts)


def _replicates(metric: Metric, plan: Plan, place: Place, sums: Sums, samples: Tensor) -> _Replicates:
    layer = place[0]
    resolved, weight = plan.resolve(metric, place), plan.parameter(layer, metric)
    if metric.needs() and not resolved:
        return _Replicates(reason=absent(plan, plan.wanted(metric, place)) or "there is no next layer")
    if metric.weighted and weight is None:
        return _Replicates(reason="no batch norm follows the layer")
    known = kept(plan, layer, resolved)
    if isinstance(weight, Tensor):
        weight = known.weight(weight, all(need.port != "input" for _, need in resolved.values()))
    parts = _Parts(metric, plan, resolved, sums)
    present = [g for g, n in enumerate(samples.tolist()) if n]
    if metric.grouped:
        whole = {name: [values[g] for g in present] for name, values in parts.by_group(len(samples)).items()}
        return _Replicates(metric(weight, **whole), kept=known)
    statistics = parts.whole()
    value, left = metric(weight, **statistics), None
    errors = bool(resolved) and metric.shape != "pair"
    if errors and not parts.single and len(present) > 1:
        left = torch.stack([metric(weight, **parts.without(g)) for g in present])
    null = (weight, {k: need for k, (_, need) in resolved.items()}, statistics) if resolved else ()
    return _Replicates(value, left, errors, metric.counts(weight, **statistics), known, null)


def _scattered(found: Measured, plan: Plan, metric: Metric, layer: Layer) -> Measured:
    """Values of the sampled units among all of the layer's, NaN for the others; a matrix of pairs stays as it is."""
    side = _axis(metric)
    ids = found.kept.inputs if side == "input" else found.kept.units
    if ids is None or metric.shape not in ("unit", "input"):
        return replace(found, kept=Kept())
    every = {
        suffix: value.new_full((plan.seen(layer, side).width,), math.nan).index_copy(0, ids, value)
        for suffix, value in found.columns.items()
    }
    return replace(found, columns=every, kept=found.kept._replace(units=ids))


def _absent(plan: Plan, metric: Metric, layer: Layer, reason: str, bias: bool) -> Measured:
    """No value where a metric has one: for any unit of a layer, for the layer, for two of them."""
    suffixes = ("",) if not metric.needs() or metric.shape == "pair" else ("", "_se", "_bias") if bias else ("", "_se")
    width = [] if metric.shape in ("layer", "edge", "pair") else [plan.seen(layer, _axis(metric)).width]
    return Measured({s: torch.full(width, math.nan, dtype=torch.float64) for s in suffixes}, reason=reason)


def _axis(metric: Metric) -> str:
    """The side of a layer that a metric has values of."""
    return "input" if metric.shape == "input" else "output"


class _Parts:
    """The sums that a metric reads at a place: the whole, and the whole but for one group."""

    def __init__(self, metric: Metric, plan: Plan, resolved: dict[str, tuple[Layer, Need]], sums: Sums):
        self.metric, self.resolved = metric, resolved
        self.held = {name: sums[layer.name, plan.lookup(layer, need)] for name, (layer, need) in resolved.items()}
        self.single = plan.groups < 2 or any(len(accumulator.parts) < 2 for accumulator in self.held.values())

    def whole(self) -> dict[str, Any]:
        return _listed({name: self._adapted(name, accumulator.value) for name, accumulator in self.held.items()})

    def without(self, group: int) -> dict[str, Any]:
        return _listed({name: self._adapted(name, a.without(group), group) for name, a in self.held.items()})

    def by_group(self, groups: int) -> dict[str, Any]:
        if self.single:
            return {name: [self._adapted(name, a.value)] * groups for name, a in self.held.items()}
        return {
            name: [None if p is None else adapt(p, self.resolved[name][1].statistic) for p in a.parts]
            for name, a in self.held.items()
        }

    def _adapted(self, name: str, value: Any, group: int | None = None) -> Any:
        layer, need = self.resolved[name]
        if value is None:
            raise ValueError(_nothing(self.metric, layer, need, group))
        return adapt(value, need.statistic)


def _listed(statistics: dict[str, Any]) -> dict[str, Any]:
    """Statistics of several readers, ``x/0``, ``x/1``, as one list ``x``."""
    found: dict[str, Any] = {}
    for name, value in statistics.items():
        stem, slash, _ = name.rpartition("/")
        if slash:
            found.setdefault(stem, []).append(value)
        else:
            found[name] = value
    return found


def _nothing(metric: Metric, layer: Layer, need: Need, without: int | None) -> str:
    if "grad" in need.port:
        return (
            f"{metric.names[0]}: no gradient reached layer {layer.title!r}: the loss does not depend on it; leave the layer "
            "out (layers=)"
        )
    rest = "" if without is None else f" outside group {without}"
    return f"{metric.names[0]}: no rows were seen at layer {layer.title!r}{rest}: the data are empty, or the layer did not run"


def _note(table: Table, where: str, name: str, metric: Metric, found: Measured, plan: Plan, place: Place) -> None:
    """Writes down why a number is missing, and how often a rule was used."""
    table.counts += [{"layer": where, "metric": name, "rule": k, "count": v} for k, v in found.counts.items() if v]
    for suffix, value in found.columns.items():
        beyond = 0 if found.kept.units is None else len(value) - len(found.kept.units)
        lost = int(value.isnan().sum()) - beyond
        if beyond:
            table.missing.append({"layer": where, "column": name + suffix, "count": beyond, "reason": found.kept.reason})
        if not lost:
            continue
        reason = found.reason or metric.nan
        if suffix in ("_se", "_bias") and not found.reason:
            resolved = [each for part in plan.parts(metric, place[0]) for each in plan.resolve(metric, (part, place[1])).values()]
            model = any(need.port == "model" for _, need in resolved)
            wide = any(plan.groups_of(owner, need) == 1 for owner, need in resolved)
            alone = bool((value.isnan() & ~found.value.isnan()).any()) and plan.groups < 2
            reason = (
                "sums over the whole model are kept once, not once per group of samples"
                if model
                else f"pair sums wider than {GROUPED_WIDTH} are kept once, not once per group of samples"
                if wide and plan.groups > 1
                else "fewer than two groups of samples"
                if alone
                else f"the value, or one without a group of samples, has none: {reason}"
            )
        table.missing.append({"layer": where, "column": name + suffix, "count": lost, "reason": reason})
