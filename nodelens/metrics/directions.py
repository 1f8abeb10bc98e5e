"""Similarity of the directions of rows, and dimensions without centring or corrected for few rows."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nodelens.statistics import Directions, Gram, NormedGram
from nodelens.statistics.linalg import debiased_hsic, spectrum

from .base import Metric
from .covariances import constant_units
from .need import Need, View


@dataclass(frozen=True)
class CosineMean(Metric):
    """Mean cosine of two different rows, over all pairs: how anisotropic the rows are.

    The rows are not centred, so a common mean or a ReLU gives values above 0. Rows of length zero have no direction and are left
    out. The value is exact and takes one pass: pairs are not sampled.

    Formula: (|sum_i u_i|^2 - n) / (n (n - 1)), u_i = y_i/|y_i|
    Shapes: y over rows of width units -> ()
    Unit:   none, in [-1/(n - 1), 1]; centred rows: about 0; rows of one direction: 1
    NaN:    fewer than two rows that are not zero
    Source: Ethayarajh 2019, 1909.00512, section 3.3
    """

    names: ClassVar = ("cos_sim_mean",)
    kind: ClassVar = "layer"
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Directions, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Directions) -> Tensor:
        return _mean_cosine(y)


@dataclass(frozen=True)
class CosineDeviation(Metric):
    """Standard deviation of the cosine of two different rows, over all pairs.

    Rows are those of cos_sim_mean. With float32 rows, values below about 1e-3 are rounding error.

    Formula: sqrt((m2 - m1^2) M/(M - 1)), m1 cos_sim_mean, m2 = (||sum_i u_i u_i'||_F^2 - n)/M, u_i = y_i/|y_i|, M = n (n - 1)
    Shapes: y over rows of width units -> ()
    Unit:   none, from 0 to about 1; centred rows with equal eigenvalues: about 1/sqrt(units); rows of one direction: 0
    NaN:    fewer than two rows that are not zero
    Source: Ethayarajh 2019, 1909.00512, section 3.3
    """

    names: ClassVar = ("cos_sim_std",)
    kind: ClassVar = "layer"
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Directions, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Directions) -> Tensor:
        pairs = _pairs(y)
        square = (y.outer.square().sum() - y.n.squeeze()) / pairs
        return ((square - _mean_cosine(y).square()).clamp_min(0) * pairs / (pairs - 1)).sqrt()


def _pairs(y: Directions) -> Tensor:
    """The number of ordered pairs of different rows, (); NaN for none."""
    n = y.n.double().squeeze()
    return (n * (n - 1)).where(n > 1, torch.nan)


def _mean_cosine(y: Directions) -> Tensor:
    return (y.total.square().sum() - y.n.squeeze()) / _pairs(y)


@dataclass(frozen=True)
class DebiasedParticipationRatio(Metric):
    """Participation ratio with unbiased numerator and denominator. Use it when rows are few.

    It is not clipped: with very few rows it may lie outside [1, units]. For 100 normal rows and a true value of 27.2 it gives 27.4
    on average, and the plain ratio 21.3.

    Formula: [(tr C)^2 - v]/HSIC_1, v = (n/(n-1))^2 var(e)/n, HSIC_1 = [||S||_F^2 + (tr S)^2/((n-1)(n-2)) - n/(n-2) sum e^2]
             /(n(n-3)), e = |y - mean|^2, S the centred sum of products, C = S/(n-1)
    Shapes: y over rows of width units -> ()
    Unit:   directions, about [1, units]; equal eigenvalues: units
    NaN:    fewer than four rows, no variance, or HSIC_1 <= 0
    Source: Chun et al. 2025, 2509.26560
    """

    names: ClassVar = ("participation_ratio_debiased",)
    kind: ClassVar = "layer"
    nan: ClassVar = "fewer than four rows, no variance, or too few rows for a positive denominator"
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {"y": Need(NormedGram, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: NormedGram) -> Tensor:
        n, about = y.n.double().squeeze(), y.centred()
        trace, quartic = about.outer.trace(), about.quartic.squeeze()
        norms = (quartic - trace.square() / n) / (n - 1)
        square = (trace / (n - 1)).square() - (n / (n - 1)).square() * norms / n
        hsic = debiased_hsic(y.n, about.outer.square().sum(), trace, trace, quartic)
        return (square / hsic).where((hsic > 0) & ~constant_units(y).all(), torch.nan)


@dataclass(frozen=True)
class RankMe(Metric):
    """Effective rank of the rows without centring, so the mean counts as a direction; meant for self-supervised embeddings.

    Rows far from the origin give values near 1 however they vary; effective_rank subtracts the mean first. The constant 1e-7 comes
    from the source. Singular values that the rounding of the rows and their products hides count as 0.

    Formula: exp(-sum_i p_i ln p_i), p_i = s_i/sum s + 1e-7, s_i the singular values of the rows, not centred
    Shapes: y over rows of width units -> ()
    Unit:   directions, in [1, units]; equal and centred: units
    NaN:    no rows, or all zero
    Source: Garrido et al. 2022, 2210.02885, eq. 2
    """

    names: ClassVar = ("rankme",)
    kind: ClassVar = "layer"
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Gram, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Gram) -> Tensor:
        raw = y.about(shift=torch.zeros_like(y.shift)).outer
        s = spectrum(raw, y.rounding).sqrt()
        return torch.special.entr(s / s.sum() + 1e-7).sum().exp()
