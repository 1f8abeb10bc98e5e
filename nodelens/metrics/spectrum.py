"""Dimension of a layer: how many directions it varies in, from the eigenvalues of its covariance."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nodelens.statistics import Directions, Gram
from nodelens.statistics.linalg import components, entropy_count

from .base import Metric
from .covariances import constant_units, correlation_of, eigenvalues_of, live_covariance, rounding_of
from .need import Need, View

ROWS_PER_UNIT = 10  # with fewer rows the entropy dimension of independent units is more than 5 % too small


@dataclass(frozen=True)
class SpectrumMetric(Metric):
    """Base class of functions ``of`` the eigenvalues of a layer's covariance.

    rows: ``raw``; ``token_l2``, each row scaled to length 1; ``token_rms``, each row scaled to root mean square 1, which gives the
    same values; ``feature_standardized``, each unit scaled to variance 1. A constant unit adds an eigenvalue of 0 (``constant``).
    An eigenvalue that the rounding of the rows and their products hides counts as 0 (``unresolved``): below about 2e-6 of the
    variance of the units in its direction for float32 products, 1e-12 for float64. ``few_rows`` flags a layer with fewer than 10
    rows per unit that varies: sample eigenvalues spread, so that dimensions come out too small and slopes too steep.
    """

    kind: ClassVar = "layer"
    nan: ClassVar = "fewer than two rows, or no variance"
    rows: Literal["raw", "token_l2", "token_rms", "feature_standardized"] = "raw"
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Directions if self.rows.startswith("token") else Gram, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Gram) -> Tensor:
        return self.of(eigenvalues_of(y, self.rows == "feature_standardized"))

    def of(self, eigenvalues: Tensor) -> Tensor:
        """The value from eigenvalues, (d,), largest first -> ()."""
        raise TypeError(f"{type(self).__name__} has no formula")

    def covariance(self, y: Gram) -> Tensor:
        """The matrix whose eigenvalues are used, (units, units)."""
        return correlation_of(y) if self.rows == "feature_standardized" else live_covariance(y)

    def rounding(self, y: Gram) -> Tensor:
        """The rounding error of the diagonal of that matrix, (units,)."""
        return rounding_of(y, self.rows == "feature_standardized")

    def counts(self, weight: Tensor | None, y: Gram) -> dict[str, int]:
        unresolved = unresolved_directions(y, eigenvalues_of(y, self.rows == "feature_standardized"))
        return {"constant": int(constant_units(y).sum()), "unresolved": unresolved, "few_rows": few_rows(y)}


def unresolved_directions(y: Gram, eigenvalues: Tensor) -> int:
    """How many directions count as 0, although there are enough rows and varying units for them."""
    most = min(int((~constant_units(y)).sum()), int(y.n) - 1)
    return max(0, most - int((eigenvalues > 0).sum())) if int(y.n) > 1 else 0


def few_rows(y: Gram) -> int:
    """1 if there are so few rows per varying unit that a spectrum is biased, otherwise 0."""
    return int(int(y.n) < ROWS_PER_UNIT * int((~constant_units(y)).sum()))


@dataclass(frozen=True)
class ParticipationRatio(SpectrumMetric):
    """Effective number of directions that share the variance, from second moments, without an eigendecomposition.

    It is biased downwards when rows are few: 1/value is about 1/n + 1/(true value). ``participation_ratio_debiased`` corrects this.
    ``normalize`` divides by the width.

    Formula: (sum_i lam_i)^2 / sum_i lam_i^2 = (tr C)^2 / ||C||_F^2, C the covariance, lam its eigenvalues; normalized: /units
    Shapes: y over rows of width units -> ()
    Unit:   directions, in [1, units]; normalized: a share, in [1/units, 1]; eigenvalues 4, 2, 1, 1: 2.909
    NaN:    fewer than two rows, or no variance
    Source: Gao et al. 2017, bioRxiv 214262, eq. 5
    """

    names: ClassVar = ("participation_ratio",)
    normalize: bool = False

    def __call__(self, weight: Tensor | None, y: Gram) -> Tensor:
        c = self.covariance(y)
        return self._scaled(c.trace().square() / c.square().sum(), len(c))

    def counts(self, weight: Tensor | None, y: Gram) -> dict[str, int]:
        return {"constant": int(constant_units(y).sum()), "few_rows": few_rows(y)}

    def of(self, eigenvalues: Tensor) -> Tensor:
        return self._scaled(eigenvalues.sum().square() / eigenvalues.square().sum(), len(eigenvalues))

    def _scaled(self, value: Tensor, units: int) -> Tensor:
        return value / units if self.normalize else value


@dataclass(frozen=True)
class EntropyDimension(SpectrumMetric):
    """Effective number of directions that share the variance: exponential of the entropy of the eigenvalue shares.

    It gives small eigenvalues more weight than the participation ratio does. ``normalize`` divides by the width.

    Formula: exp(-sum_i p_i ln p_i), p_i = lam_i/sum lam, lam the eigenvalues of the covariance; normalized: /units
    Shapes: y over rows of width units -> ()
    Unit:   directions, in [1, units]; normalized: a share, in [1/units, 1]; eigenvalues 4, 2, 1, 1: 3.364
    NaN:    fewer than two rows, or no variance
    Source: Roy & Vetterli 2007, EUSIPCO, definition 1, with eigenvalues in place of singular values
    """

    names: ClassVar = ("entropy_dimension",)
    normalize: bool = False

    def of(self, eigenvalues: Tensor) -> Tensor:
        value = entropy_count(eigenvalues)
        return value / len(eigenvalues) if self.normalize else value


@dataclass(frozen=True)
class EffectiveRank(SpectrumMetric):
    """Exponential of the entropy of the shares of the singular values of the centred rows.

    Singular values are proportional to the square roots of the eigenvalues, so the tail, and its rounding error, has more weight
    than in ``entropy_dimension``.

    Formula: exp(-sum_i p_i ln p_i), p_i = s_i/sum s, s = sqrt(lam), lam the eigenvalues of the covariance
    Shapes: y over rows of width units -> ()
    Unit:   directions, in [1, units]; eigenvalues 4, 2, 1, 1: 3.828
    NaN:    fewer than two rows, or no variance
    Source: Roy & Vetterli 2007, EUSIPCO, definition 1
    """

    names: ClassVar = ("effective_rank",)

    def of(self, eigenvalues: Tensor) -> Tensor:
        return entropy_count(eigenvalues.sqrt())


@dataclass(frozen=True)
class StableRank(SpectrumMetric):
    """Total variance divided by the variance along the first direction: at most the rank, and insensitive to small eigenvalues.

    Formula: sum_i lam_i / lam_1, lam the eigenvalues of the covariance, largest first
    Shapes: y over rows of width units -> ()
    Unit:   directions, in [1, units]; eigenvalues 4, 2, 1, 1: 2
    NaN:    fewer than two rows, or no variance
    Source: Rudelson & Vershynin 2007, J. ACM 54(4), section 1, math/0503442
    """

    names: ClassVar = ("stable_rank",)
    log_interval: ClassVar = True

    def of(self, eigenvalues: Tensor) -> Tensor:
        return eigenvalues.sum() / eigenvalues[0]


@dataclass(frozen=True)
class TopShare(SpectrumMetric):
    """Share of the variance in the k leading directions; k is at most the width.

    Formula: sum_{i<=k} lam_i / sum_i lam_i, lam the eigenvalues of the covariance, largest first
    Shapes: y over rows of width units -> ()
    Unit:   none, in [k/units, 1]; eigenvalues 4, 2, 1, 1 and k = 1: 0.5
    NaN:    fewer than two rows, or no variance
    Raises: ValueError when k is below 1
    Source: Jolliffe 2002, Principal Component Analysis, 2nd ed., section 6.1.1
    """

    names: ClassVar = ("top_share",)
    limits: ClassVar = {"k": (lambda k: k >= 1, "it takes 1 or more directions")}
    k: int = 10

    def of(self, eigenvalues: Tensor) -> Tensor:
        return eigenvalues[: self.k].sum() / eigenvalues.sum()


@dataclass(frozen=True)
class ComponentCount(SpectrumMetric):
    """Smallest number of leading directions that hold a given share of the variance.

    Formula: min k with sum_{i<=k} lam_i / sum_i lam_i >= share - 1e-12, lam the eigenvalues of the covariance, largest first
    Shapes: y over rows of width units -> ()
    Unit:   directions, whole, in [1, units]; eigenvalues 4, 2, 1, 1 and share 0.9: 4
    NaN:    fewer than two rows, or no variance
    Raises: ValueError when share is not in (0, 1]
    Source: Jolliffe 2002, Principal Component Analysis, 2nd ed., section 6.1.1
    """

    names: ClassVar = ("component_count",)
    no_error: ClassVar = "a count changes in steps, so the jackknife reads 0 or much too much"
    limits: ClassVar = {"share": (lambda share: 0 < share <= 1, "it takes a number above 0, at most 1")}
    share: float = 0.9

    def of(self, eigenvalues: Tensor) -> Tensor:
        count = components(eigenvalues, self.share)
        return count.to(eigenvalues.dtype).where(eigenvalues.sum() > 0, torch.nan)
