"""The tables of a geometry analysis, computed from complete sums and a sample of rows."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from nodelens.engine.covariance import base_port
from nodelens.engine.layout import Place
from nodelens.engine.metric_sums import SampleCounts
from nodelens.engine.plan import Plan
from nodelens.engine.table import measure
from nodelens.metrics import Metric, Need
from nodelens.metrics.covariances import live_covariance
from nodelens.metrics.spectrum import SpectrumMetric
from nodelens.metrics.subspace import SubspaceMetric
from nodelens.network.layers import Layer
from nodelens.statistics import Accumulator, Directions, Gram
from nodelens.statistics.costs import adapt
from nodelens.statistics.leading_axes import leading_axes
from nodelens.statistics.linalg import spectrum

from .columns import ABLATED, VARIANTS, Columns
from .sampled import SampledRows, reads_spectrum
from .sites import HookPoint

RAW = SpectrumMetric()  # the covariance of unscaled rows


class Values:
    """Metrics of layers and layer pairs. Each eigenproblem is solved once, however many columns read it."""

    def __init__(
        self, plan: Plan, sums: Mapping[tuple[str, Need], Accumulator], sample: Mapping[str, Tensor], device: torch.device
    ):
        self.plan, self.sums, self.sample, self.device = plan, sums, SampledRows(sample), device
        self.axes = max((m.novelty_k for m in plan.metrics.values() if isinstance(m, SubspaceMetric)), default=0)
        self._spectra: dict[tuple[str, str], Tensor] = {}
        self._axes: dict[str, Tensor] = {}

    def whole(self, metric: Metric, place: Place) -> float:
        """The value from all rows; NaN at a site that is too wide for the metric."""
        if not self.plan.resolve(metric, place) and metric.needs():
            return math.nan
        if isinstance(metric, SpectrumMetric) and reads_spectrum(metric) and metric.view == "positions":
            return float(metric.of(self.spectrum(metric, place[0])))
        if isinstance(metric, SubspaceMetric) and type(metric).__call__ is SubspaceMetric.__call__ and metric.view == "positions":
            return self._between(metric, place)
        found = measure(metric, self.plan, place, self.sums, SampleCounts(torch.ones(1, dtype=torch.int64)))
        return float(found.value)

    def sampled(self, metric: Metric, place: Place) -> float:
        """The value from the sample of rows, without rows that are not finite."""
        return self.sample.value(metric, *(layer.name for layer in place if layer is not None))

    def spectrum(self, metric: SpectrumMetric, layer: Layer) -> Tensor:
        """Eigenvalues of the covariance of a layer's rows, scaled as the metric scales them; largest first."""
        key = layer.name, "token" if metric.rows.startswith("token") else metric.rows
        if key not in self._spectra:
            y = self._parts(metric, (layer, None))["y"]
            covariance, rounding = metric.covariance(y).to(self.device), metric.rounding(y).to(self.device)
            if self.axes and metric.rows == "raw":
                found, axes = leading_axes(covariance, rounding, self.axes)
                self._axes[layer.name] = axes.cpu()
            else:
                found = spectrum(covariance, rounding)
            self._spectra[key] = found.cpu()
        return self._spectra[key]

    def rows(self, layer: Layer) -> int | None:
        """Number of rows in the products of a layer; None without products."""
        held = [
            a.value
            for (name, need), a in self.sums.items()
            if name == layer.name and (base_port(need.port), need.view) == ("output", "positions")
        ]
        return next((int(v.n) for v in held if isinstance(v, Gram) and not isinstance(v, Directions)), None)

    def _between(self, metric: SubspaceMetric, place: Place) -> float:
        parts = self._parts(metric, place)
        before, after = (self.spectrum(RAW, layer) for layer in place if layer is not None)
        k = _axes(metric, before, after)
        if len(before) != len(after) or not k:
            return math.nan
        u, v = (self._axes[layer.name][:, :k] for layer in place if layer is not None)
        return float(metric.between(u, v, live_covariance(parts["y"])))

    def compared_axes(self, k: int, *layers: Layer) -> int:
        """How many of ``k`` leading directions are compared: only those with variance."""
        width = min(self.plan.seen(layer, "output").width for layer in layers)
        known = [self._spectra[layer.name, "raw"] for layer in layers if (layer.name, "raw") in self._spectra]
        return min(k, width, *(int((values > 0).sum()) for values in known))

    def _parts(self, metric: Metric, place: Place) -> dict[str, Any]:
        found = {}
        for name, (owner, need) in self.plan.resolve(metric, place).items():
            value = self.sums[owner.name, self.plan.lookup(owner, need)].value
            if value is None:
                raise ValueError(f"no row was seen at {owner.name}: the data have no unmasked token, or the module did not run")
            found[name] = adapt(value, need.statistic)
        return found


def metrics_table(
    points: Sequence[HookPoint], columns: Columns, values: Values, about: Mapping[str, str], tokens: int
) -> pd.DataFrame:
    """One row per layer: its position, the number of tokens, and one column per metric."""
    rows = []
    for point in points:
        for k, layer in point.sites.items():
            n = values.rows(layer)
            row = _identity(about, point, len(points)) | {
                "layer": k,
                "num_layers": len(point.sites),
                "layer_norm_depth": k / max(1, *point.sites),
                "tokens_observed": tokens if n is None else n,
                "hidden_dim": values.plan.seen(layer, "output").width,
            }
            rows.append(row | _row(columns, "layer", values, (layer, None)))
    return pd.DataFrame(rows)


def novelty_table(
    points: Sequence[HookPoint], columns: Columns, values: Values, about: Mapping[str, str], novelty_k: int
) -> pd.DataFrame:
    """One row per pair of consecutive measured layers."""
    rows = []
    for point in points if columns.of("edge") else ():
        sites = list(point.sites.items())
        for (k, layer), (after, other) in itertools.pairwise(sites):
            place = {"layer": k, "transition": f"{k}->{after}", "novelty_k": values.compared_axes(novelty_k, layer, other)}
            rows.append(_identity(about, point, len(points)) | place | _row(columns, "edge", values, (layer, other)))
    names = ["model_key", "model_label", "layer", "transition", "novelty_k", *columns.of("edge")]
    return pd.DataFrame(rows, columns=None if rows else names)


def ablation_table(points: Sequence[HookPoint], columns: Columns, values: Values, about: Mapping[str, str]) -> pd.DataFrame:
    """One row per layer and variant: the spectrum columns of scaled rows, over all tokens."""
    rows = []
    for point in points:
        for k, layer in point.sites.items():
            for variant in VARIANTS:
                metrics = {column: columns.ablation[variant, column] for column in ABLATED}
                place = {"layer": k, "variant": variant, "tokens": values.rows(layer)}
                found = {column: values.whole(metric, (layer, None)) for column, metric in metrics.items()}
                width = {"hidden_dim": values.plan.seen(layer, "output").width}
                rows.append(_identity(about, point, len(points)) | place | width | found)
    return pd.DataFrame(rows)


def eigenvalues(points: Sequence[HookPoint], values: Values) -> dict[str, np.ndarray]:
    """{layer_00: (width,) float64}, largest first, in the unit of x squared; with several hook points {point.layer_00: ...}."""
    found = {}
    for point in points:
        for k, layer in point.sites.items():
            if values.rows(layer) is not None:
                name = f"layer_{k:02d}" if len(points) == 1 else f"{point.name}.layer_{k:02d}"
                found[name] = values.spectrum(RAW, layer).numpy()
    return found


def _identity(about: Mapping[str, str], point: HookPoint, points: int) -> dict[str, Any]:
    return dict(about) | ({"hook_point": point.name} if points > 1 else {})


def _row(columns: Columns, kind: str, values: Values, place: Place) -> dict[str, float]:
    found = columns.of(kind).items()
    return {c: (values.sampled if c in columns.sampled else values.whole)(metric, place) for c, metric in found}


def _axes(metric: SubspaceMetric, before: Tensor, after: Tensor) -> int:
    return min(metric.novelty_k, *(int((values > 0).sum()) for values in metric.cut(before, after)))
