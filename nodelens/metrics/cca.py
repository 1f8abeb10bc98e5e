"""Linear similarity of two layers: canonical correlations, and the distance after the best rotation."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nodelens.statistics import Gram, Pair
from nodelens.statistics.linalg import components

from .covariances import axes_of, live_covariance
from .layer_pair import EdgeMetric, live_cross
from .need import Need
from .spectrum import unresolved_directions

ROWS = 5  # per direction of either layer; with fewer rows, unrelated layers appear correlated
FEW_ROWS = 50  # per direction of either layer; with fewer rows, unrelated layers have a mean correlation of 0.085 or more


@dataclass(frozen=True)
class CCA(EdgeMetric):
    """Mean canonical correlation of two layers: how far each is a linear function of the other. Every direction counts equally.

    ``keep: 1`` uses all directions with variance, and units scaled to variance 1, which changes no canonical correlation but keeps
    small units apart from rounding (``unresolved`` counts the directions that it hides all the same). ``svcca`` keeps the leading
    directions of each layer that hold 99 % of its variance. The value is biased upwards when rows are few: unrelated layers of d
    directions each give about 0.85 sqrt(d/n). ``few_rows`` flags fewer than 50 rows per direction. With ``keep: 1``, fewer than 5
    give NaN (``too_few_rows``) rather than an error, so that one wide layer does not stop a run.

    Formula: mean of the singular values of C_xx^-1/2 C_xy C_yy^-1/2, C covariances on the directions that are kept
    Shapes: x over rows of width d_x, y of width d_y -> ()
    Unit:   none, in [0, 1]; y = x A with an invertible A: 1
    NaN:    a layer without variance; more than 1 % of the rows valid in one layer only; with ``keep: 1``, fewer rows than 5 times
            the directions of both layers
    Raises: ValueError when keep is not in (0, 1]
    Source: Raghu et al. 2017, 1706.05806, section 2.1
    """

    names: ClassVar = ("cca_mean",)
    presets: ClassVar = {"svcca": {"keep": 0.99}}
    nan: ClassVar = (
        "a layer without variance, fewer rows than 5 times the directions of both layers, or more than 1 % of the rows valid in "
        "one layer only"
    )
    limits: ClassVar = {"keep": (lambda share: 0 < share <= 1, "it takes a share of the variance above 0, at most 1")}
    keep: float = 1.0

    def needs(self) -> dict[str, Need]:
        return self.both()

    def __call__(self, weight: Tensor | None, x: Gram, y: Gram, xy: Pair) -> Tensor:
        (lam_x, u_x, sd_x), (lam_y, u_y, sd_y) = self._kept(x), self._kept(y)
        if not (len(lam_x) and len(lam_y)) or self._fewer(ROWS * (self.keep == 1), xy, lam_x, lam_y):
            return xy.cross.new_full((), torch.nan)
        cross = u_x.T @ (live_cross(x, y, xy) / sd_x[:, None] / sd_y) @ u_y
        if not cross.isfinite().all():
            return xy.cross.new_full((), torch.nan)
        turned, r, _ = torch.linalg.svd(cross / lam_x[:, None].sqrt() / lam_y.sqrt(), full_matrices=False)
        return self.summary(r.clamp_max(1), turned, sd_x[:, None] * u_x * lam_x.sqrt())

    def summary(self, r: Tensor, turned: Tensor, spread: Tensor) -> Tensor:
        """The value from canonical correlations (k,), x's directions on its axes (k_x, k) and the axes scaled by sd (d_x, k_x)."""
        return r.mean()

    def _kept(self, side: Gram) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues (k,) and axes (d, k) of the directions that are kept, and the scales of the units in which they are (d,)."""
        variance, standardized = live_covariance(side).diagonal(), self.keep == 1
        sd = variance.where(variance > 0, 1.0).sqrt() if standardized else torch.ones_like(variance)
        lam, axes = axes_of(side, standardized)
        rank = int((lam > 0).sum())
        k = min(rank, int(components(lam, self.keep))) if self.keep < 1 else rank
        return lam[:k], axes[:, :k], sd

    @staticmethod
    def _fewer(rows: int, xy: Pair, *spectra: Tensor) -> bool:
        """Whether there are fewer rows than this number per direction."""
        return int(xy.n) < rows * sum(map(len, spectra))

    def counts(self, weight: Tensor | None, x: Gram, y: Gram, xy: Pair) -> dict[str, int]:
        kept = [self._kept(side)[0] for side in (x, y)]
        hidden = sum(unresolved_directions(side, lam) for side, lam in zip((x, y), kept, strict=True)) if self.keep == 1 else 0
        too_few = self._fewer(ROWS * (self.keep == 1), xy, *kept)
        few = self._fewer(FEW_ROWS, xy, *kept) and not too_few
        return {"too_few_rows": int(too_few), "few_rows": int(few), "unresolved": hidden}


@dataclass(frozen=True)
class ProjectionWeightedCCA(CCA):
    """Mean canonical correlation of two layers, each weighted by how much of the first layer its direction accounts for.

    It is not symmetric, because the weights come from x. ``keep`` and the check for few rows are those of cca_mean.

    Formula: sum_i a_i r_i/sum_i a_i, a_i = sum_j |h_i.x_j|, r and u the singular values and left vectors of
             C_xx^-1/2 C_xy C_yy^-1/2, h_i = x C_xx^-1/2 u_i the canonical variates of x, x_j the units of x, centred
    Shapes: x over rows of width d_x, y of width d_y -> ()
    Unit:   none, in [0, 1]; y = x A with an invertible A: 1
    NaN:    a layer without variance; more than 1 % of the rows valid in one layer only; with ``keep: 1``, fewer rows than 5 times
            the directions of both layers
    Raises: ValueError when keep is not in (0, 1]
    Source: Morcos, Raghu & Bengio 2018, 1806.05759, section 2.2
    """

    names: ClassVar = ("pwcca",)
    presets: ClassVar = {}

    def summary(self, r: Tensor, turned: Tensor, spread: Tensor) -> Tensor:
        weights = (spread @ turned).abs().sum(0)
        return (weights * r).sum() / weights.sum()


@dataclass(frozen=True)
class Procrustes(EdgeMetric):
    """Squared distance of two layers after the best rotation of one onto the other; the narrower layer is padded with zeros.

    The value grows with the number of rows and with their scale; ``angular`` depends on neither.

    Formula: tr S_xx + tr S_yy - 2||S_xy||_*, S centred sums of products, ||.||_* the sum of singular values;
             angular: arccos(||S_xy||_*/sqrt(tr S_xx tr S_yy))
    Shapes: x over rows of width d_x, y of width d_y -> ()
    Unit:   that of x squared, 0 or above; angular: radians, in [0, pi/2]; y = x Q with an orthogonal Q: 0
    NaN:    fewer than two rows; more than 1 % of the rows valid in one layer only; angular: a layer without variance
    Source: Schoenemann 1966, Psychometrika 31:1; Williams et al. 2021, 2110.14739, eq. 5
    """

    names: ClassVar = ("procrustes",)
    presets: ClassVar = {"procrustes_angular": {"angular": True}}
    nan: ClassVar = "fewer than two rows; more than 1 % of the rows valid in one layer only; angular: a layer without variance"
    angular: bool = False

    def needs(self) -> dict[str, Need]:
        return self.both()

    def __call__(self, weight: Tensor | None, x: Gram, y: Gram, xy: Pair) -> Tensor:
        own, other = (live_covariance(side).trace() for side in (x, y))
        cross = live_cross(x, y, xy)
        if not cross.isfinite().all():
            return own.new_full((), torch.nan)
        common = torch.linalg.svdvals(cross).sum()
        if self.angular:
            return (common / (own * other).sqrt()).clamp_max(1).arccos()
        return (own + other - 2 * common).clamp_min(0) * (xy.n.squeeze() - 1)
