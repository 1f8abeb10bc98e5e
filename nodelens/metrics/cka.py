"""Similarity of the geometry of two layers: centred kernel alignment, plain and debiased."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nodelens.statistics import Gram, NormedGram, NormedPair, Pair
from nodelens.statistics.linalg import debiased_hsic

from .covariances import constant_units, live_covariance
from .layer_pair import EdgeMetric, live_cross, unpaired
from .need import Need

CHANCE = 0.05  # value for unrelated layers that counts as a bias


@dataclass(frozen=True)
class LinearCKA(EdgeMetric):
    """Centred kernel alignment with linear kernels: similarity of two layers up to rotation and scale.

    It is biased upwards when rows are few: unrelated layers give sqrt(p_x p_y)/n, p their participation ratios. For independent
    units and width d this is about d/(d + n), 0.80 for 128 rows of width 512. ``few_rows`` flags layers where it exceeds 0.05.
    linear_cka_debiased does not have this bias.

    Formula: ||C_xy||_F^2 / (||C_xx||_F ||C_yy||_F), C covariances
    Shapes: x over rows of width d_x, y of width d_y -> ()
    Unit:   none, in [0, 1]; y = 3 x Q with an orthogonal Q: 1
    NaN:    fewer than two rows, a layer without variance, or more than 1 % of the rows valid in one layer only
    Source: Kornblith et al. 2019, 1905.00414, section 3
    """

    names: ClassVar = ("linear_cka",)
    nan: ClassVar = "fewer than two rows, a layer without variance, or more than 1 % of the rows valid in one layer only"

    def needs(self) -> dict[str, Need]:
        return self.both()

    def __call__(self, weight: Tensor | None, x: Gram, y: Gram, xy: Pair) -> Tensor:
        own, other = (torch.linalg.matrix_norm(live_covariance(side)) for side in (x, y))
        value = live_cross(x, y, xy).square().sum() / (own * other)
        return value.clamp_max(1)  # over the same rows only rounding exceeds 1

    def counts(self, weight: Tensor | None, x: Gram, y: Gram, xy: Pair) -> dict[str, int]:
        spread, other = (c.trace() / torch.linalg.matrix_norm(c) for c in map(live_covariance, (x, y)))
        return {"few_rows": int(spread * other > CHANCE * (int(xy.n) - 1))}


@dataclass(frozen=True)
class DebiasedCKA(EdgeMetric):
    """Centred kernel alignment with linear kernels and unbiased terms: unrelated layers give 0 on average, even with few rows.

    It equals the U-statistic over the n x n matrices of inner products, computed from sums of one pass. It is not clipped.

    Formula: H(x,y)/sqrt(H(x,x) H(y,y)), H(x,y) = [||S_xy||_F^2 + tr S_xx tr S_yy/((n-1)(n-2)) - n/(n-2) sum e f]/(n(n-3)),
             S centred sums of products, e = |x - mean|^2, f = |y - mean|^2
    Shapes: x over rows of width d_x, y of width d_y -> ()
    Unit:   none, at most about 1; y = 3 x Q with an orthogonal Q: 1
    NaN:    fewer than four rows, a layer without variance, H(x,x) <= 0 or H(y,y) <= 0, or more than 1 % of the rows valid in one
            layer only
    Source: Song et al. 2012, JMLR 13, eq. 5; Murphy et al. 2024, 2405.01012
    """

    names: ClassVar = ("linear_cka_debiased",)
    nan: ClassVar = (
        "fewer than four rows, a layer without variance, so few rows that a self term is 0 or below, or more than 1 % of the rows "
        "valid in one layer only"
    )

    def needs(self) -> dict[str, Need]:
        return self.both(NormedGram, NormedPair)

    def __call__(self, weight: Tensor | None, x: NormedGram, y: NormedGram, xy: NormedPair) -> Tensor:
        own, other, both = self._self_term(x), self._self_term(y), xy.centred()
        square = both.cross.square().sum()
        cross = debiased_hsic(both.n, square, both.e.squeeze(), both.f.squeeze(), both.mixed.squeeze())
        return (cross / (own * other).sqrt()).where(~unpaired(x, y, xy).squeeze(), torch.nan)

    @staticmethod
    def _self_term(x: NormedGram) -> Tensor:
        about = x.centred()
        trace = about.squares.sum()
        hsic = debiased_hsic(x.n, about.outer.square().sum(), trace, trace, about.quartic.squeeze())
        return hsic.where((hsic > 0) & ~constant_units(x).all(), torch.nan)
