"""Columns that read a sample of rows. What several of them read is computed once."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nodelens.metrics import Metric, Need
from nodelens.metrics.spectrum import ParticipationRatio, SpectrumMetric
from nodelens.statistics import Cosines, Gram
from nodelens.statistics.costs import supersets_of
from nodelens.statistics.linalg import constant, resolution, symmetric_eigenvalues
from nodelens.statistics.rows import Rows

_OF_SPECTRUM = (SpectrumMetric.__call__, ParticipationRatio.__call__)


def reads_spectrum(metric: Metric) -> bool:
    """Whether a metric is a function of eigenvalues alone, with the formula of its class."""
    return isinstance(metric, SpectrumMetric) and type(metric).__call__ in _OF_SPECTRUM


class SampledRows:
    """The same rows at every site. A row that is not finite at one of the sites that a metric reads is left out there."""

    def __init__(self, sample: Mapping[str, Tensor]):
        self.sample = sample
        self._made: dict[tuple[Any, ...], Any] = {}

    def value(self, metric: Metric, *sites: str) -> float:
        """The value of a metric of a site, or of a site and the next one; NaN below two rows."""
        widths, left_out = {self.sample[site].shape[1] for site in sites}, self._left_out(sites)
        rows = len(self.sample[sites[0]]) - len(left_out)
        if rows < 2 or (metric.names[0] == "layer_cosine_sim" and len(widths) > 1):
            return math.nan
        if reads_spectrum(metric):
            return float(metric.of(self._spectrum(sites[0], left_out)))  # type: ignore[attr-defined]
        return float(metric(None, **{name: self._statistic(need, sites, left_out) for name, need in metric.needs().items()}))

    def _left_out(self, sites: tuple[str, ...]) -> tuple[int, ...]:
        """The places of the rows that are not finite at one of the sites."""

        def made(site: str) -> tuple[int, ...]:
            return tuple((~self.sample[site].isfinite().all(1)).nonzero()[:, 0].tolist())

        every = (self._once(partial(made, site), "left out", site) for site in sites)
        return tuple(sorted({place for places in every for place in places}))

    def _statistic(self, need: Need, sites: tuple[str, ...], left_out: tuple[int, ...]) -> Any:
        """What a metric needs; where a wider statistic contains it, that one, which other metrics need."""
        read = sites if need.target == "next" else sites[need.port == "next" :][:1]
        if need.statistic is Cosines:  # two sites have no common basis of fewer dimensions
            x, y = (Rows(self._given(site, left_out)[:, :, None], shifted=False) for site in read)
            return Cosines.of(x, y)
        statistic: Any = [need.statistic, *supersets_of(need.statistic)][-1]
        return self._once(lambda: statistic.of(*(self._rows(site, left_out) for site in read)), statistic, read, left_out)

    def _given(self, site: str, left_out: tuple[int, ...]) -> Tensor:
        x = self.sample[site].double()
        return x[[k for k in range(len(x)) if k not in left_out]] if left_out else x

    def _rows(self, site: str, left_out: tuple[int, ...]) -> Rows:
        """The rows of a site about their mean, float64, in at most as many dimensions as there are rows."""
        return self._once(lambda: Rows.of(_reduced_basis(self._given(site, left_out))), "rows", site, left_out)

    def _spectrum(self, site: str, left_out: tuple[int, ...]) -> Tensor:
        """Eigenvalues of the covariance of the rows, largest first, with 0 for those that rounding hides."""

        def made() -> Tensor:
            y = self._statistic(Need(Gram, "output"), (site,), left_out)
            live = ~constant(y.covariance.diagonal(), y.mean)
            found = symmetric_eigenvalues(y.covariance.where(live[:, None] & live, 0)).flip(0)
            return found.where(found > resolution(found.dtype, len(found)) * found[:1], 0)

        return self._once(made, "spectrum", site, left_out)

    def _once(self, make: Callable[[], Any], *key: Any) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _reduced_basis(x: Tensor) -> Tensor:
    """Rows (n, d) in a basis of at most n dimensions; norms and inner products of rows do not change."""
    return x if len(x) >= x.shape[1] else torch.linalg.qr(x.T, mode="r").R.T
