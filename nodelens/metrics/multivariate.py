"""Information shared by all units of a layer: total correlation and related measures. Gaussian, in nats.

All are functions of the correlation matrix R of the units, computed from its determinant and its inverse.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from nodelens.statistics import Gram
from nodelens.statistics.base import derived, is_derived
from nodelens.statistics.linalg import SOLVER, entropy_bias, spectrum

from .base import Metric
from .covariances import axes_of, constant_units, correlation_of, eigenvalues_of, rounding_of
from .need import Need, View

ROWS_PER_UNIT = 3  # with fewer rows the error of a determinant is large


class Entropies(NamedTuple):
    """Entropies of standardized units, up to constants: joint, and (negated) of each unit given the others."""

    whole: Tensor  # ()       0.5 ln det R
    rest: Tensor  # (units,) 0.5 ln P_ii, P the inverse of R; 0 where constant


@dataclass(frozen=True)
class TotalCorrelation(Metric):
    """Total dependence of the units of a layer: the sum of their entropies minus their joint entropy.

    Constant units are left out (``constant``). The plain estimate is far too large unless there are many rows per unit, so its
    bias is subtracted: exactly for independent Gaussian rows whatever the correlations, too little for dependent rows, such as
    positions of one image. The value may then be below 0. With more units than a third of the rows its error is large
    (``few_rows``). ``shrinkage: schaefer_strimmer`` shrinks the correlations towards 0, which gives a value for any number of
    rows, but one that is biased towards 0: o_information may even have the wrong sign. ``bias: auto`` corrects the plain
    estimate only.

    Formula: TC = -0.5 ln det R, R the correlations of the N units; bias: N h(1) - h(N), h(d) = 0.5 [sum_k psi((n-k)/2) +
             d ln(2/(n-1))], k = 1 .. d, n rows, psi digamma; schaefer_strimmer: that of (1-a) R + a I,
             a = sum_ij (1 - R_ij^2)^2/((n-1) sum_ij R_ij^2) over i != j, at most 1
    Shapes: y over rows of width units -> ()
    Unit:   nats, 0 and above but for the bias correction; three units, all rho 0.5: 0.3466
    NaN:    fewer than two rows; without shrinkage, no more rows than units; R singular: collinear units
    Raises: ValueError for bias: gaussian with shrinkage
    Source: Watanabe 1960, IBM J. 4, 66; Rosas et al. 2019, 1902.11239, eq. 1; bias: Ince et al. 2017, doi 10.1002/hbm.23471, eq. 5;
            Schaefer & Strimmer 2005, Stat. Appl. Genet. Mol. Biol. 4, 32, with Var r = (1 - r^2)^2/(n - 1)
    """

    names: ClassVar = ("total_correlation",)
    kind: ClassVar = "layer"
    nan: ClassVar = "fewer than two rows, collinear units, or no more rows than units without shrinkage: schaefer_strimmer"
    shrinkage: Literal["none", "schaefer_strimmer"] = "none"
    bias: Literal["auto", "none", "gaussian"] = "auto"
    view: View = "positions"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias == "gaussian" and self.shrinkage != "none":
            raise ValueError(f"{self.names[0]}: bias: gaussian is for plain correlations only; set shrinkage: none, or bias: auto")

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Gram, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Gram) -> Tensor:
        live = ~constant_units(y)
        value = self._of(entropies_of(y, self.shrinkage), int(live.sum()))
        return value if self.bias == "none" or self.shrinkage != "none" else value - self._bias(y, live)

    def counts(self, weight: Tensor | None, y: Gram) -> dict[str, int]:
        dead = int(constant_units(y).sum())
        few = ROWS_PER_UNIT * (len(y.shift) - dead) > int(y.n)
        return {"constant": dead, "few_rows": int(few)}

    def _of(self, h: Entropies, units: int) -> Tensor:
        return -h.whole

    def _bias(self, y: Gram, live: Tensor) -> Tensor:
        """The bias of the estimate: the same function, of the biases of the entropies."""
        units = int(live.sum())
        whole, alone, others = entropy_biases(y, units)
        return self._of(Entropies(whole - units * alone, (alone + others - whole).where(live, 0.0)), units)


@dataclass(frozen=True)
class DualTotalCorrelation(TotalCorrelation):
    """Joint entropy of the units of a layer minus the entropy of each unit given all others: the part of it that is shared.

    Options and caveats are those of total_correlation.

    Formula: DTC = 0.5 (ln det R + sum_i ln P_ii), R the correlations of the units, P its inverse; bias: N h(N-1) - (N-1) h(N),
             N units, h as in total_correlation
    Shapes: y over rows of width units -> ()
    Unit:   nats, 0 and above but for the bias correction; three units, all rho 0.5: 0.2616
    NaN:    as in total_correlation
    Raises: ValueError for bias: gaussian with shrinkage
    Source: Han 1978, Inf. Control 36, 133; Rosas et al. 2019, 1902.11239, eq. 2
    """

    names: ClassVar = ("dual_total_correlation",)

    def _of(self, h: Entropies, units: int) -> Tensor:
        return h.whole + h.rest.sum()


@dataclass(frozen=True)
class OInformation(TotalCorrelation):
    """Whether redundancy (above 0) or synergy (below 0) dominates among the units of a layer.

    Options and caveats are those of total_correlation.

    Formula: O = TC - DTC = -ln det R - 0.5 sum_i ln P_ii, R the correlations of the units, P its inverse
    Shapes: y over rows of width units -> ()
    Unit:   nats; three units, all rho 0.5: 0.0849; y_3 = y_1 + y_2 + e, all N(0, 1): -0.1438; one or two units: 0
    NaN:    as in total_correlation
    Raises: ValueError for bias: gaussian with shrinkage
    Source: Rosas et al. 2019, Phys. Rev. E 100, 032305, 1902.11239, eq. 3
    """

    names: ClassVar = ("o_information",)

    def _of(self, h: Entropies, units: int) -> Tensor:
        return -2 * h.whole - h.rest.sum()


@dataclass(frozen=True)
class SInformation(TotalCorrelation):
    """Mutual information of each unit of a layer with all others together, summed over units.

    Options and caveats are those of total_correlation.

    Formula: S = TC + DTC = 0.5 sum_i ln P_ii, P the inverse of the units' correlations
    Shapes: y over rows of width units -> ()
    Unit:   nats, 0 and above but for the bias correction; three units, all rho 0.5: 0.6082
    NaN:    as in total_correlation
    Raises: ValueError for bias: gaussian with shrinkage
    Source: Rosas et al. 2019, 1902.11239, section II; James, Ellison & Crutchfield 2011, Chaos 21, 037109
    """

    names: ClassVar = ("s_information",)

    def _of(self, h: Entropies, units: int) -> Tensor:
        return h.rest.sum()


@dataclass(frozen=True)
class MultiRedundancy(TotalCorrelation):
    """Mutual information of a unit with all other units of its layer together: high where they can predict it.

    Constant units have 0. Options and caveats are those of total_correlation.

    Formula: 0.5 ln P_ii, P the inverse of the units' correlations; bias: h(1) + h(N-1) - h(N), N units, h as in total_correlation
    Shapes: y over rows of width units -> (units,)
    Unit:   nats, 0 and above but for the bias correction; three units, all rho 0.5: 0.2027
    NaN:    as in total_correlation
    Raises: ValueError for bias: gaussian with shrinkage
    Source: Whittaker 1990, Graphical Models in Applied Multivariate Statistics, section 5.8; Rosas et al. 2019, 1902.11239
    """

    names: ClassVar = ("multi_redundancy",)
    higher_is_better: ClassVar = False
    kind: ClassVar = "unit"

    def _of(self, h: Entropies, units: int) -> Tensor:
        return h.rest


@derived
def entropy_biases(y: Gram, units: int) -> tuple[Tensor, Tensor, Tensor]:
    """The biases of the entropies of so many units together, of one, and of all but one, () each."""
    whole, alone, others = (entropy_bias(y.n, d)[0] for d in (units, 1, max(0, units - 1)))
    return whole, alone, others


@derived
def entropies_of(y: Gram, shrinkage: str) -> Entropies:
    """The entropies of the units that vary; NaN where the determinant of their correlations is not resolved."""
    live = ~constant_units(y)
    units, rest = int(live.sum()), torch.zeros_like(y.shift)
    r = correlation_of(y) if units == len(live) else correlation_of(y)[live][:, live]
    rounding = rounding_of(y, True)[live]
    if shrinkage == "schaefer_strimmer":
        r = shrunk(r, y.n)
        found = None if int(y.n) < 2 else _by_cholesky(r, rounding) or _by_eigenvalues(r, spectrum(r, rounding))
    elif int(y.n) <= max(1, units):
        found = None
    else:
        known = is_derived(eigenvalues_of, y, True) or is_derived(axes_of, y, True)
        found = None if known else _by_cholesky(r, rounding)
        found = found or _by_eigenvalues(r, eigenvalues_of(y, True)[:units])  # those of constant units are 0 and come last
    if found is None:
        return Entropies(rest.new_full((), torch.nan), torch.full_like(rest, torch.nan).where(live | (y.n < 2), 0.0))
    rest[live] = 0.5 * found[1].log()
    return Entropies(0.5 * found[0], rest)


def _by_cholesky(r: Tensor, rounding: Tensor) -> tuple[Tensor, Tensor] | None:
    """The logarithm of det R, (), and the diagonal of the inverse, (d,), of correlations (d, d), faster than by eigenvalues.

    None unless rounding surely hides no eigenvalue: the smallest is at least 1/|P|, |P| the Frobenius norm of the inverse.
    """
    factor, failed = torch.linalg.cholesky_ex(r)
    if int(failed) or not len(r):
        return None
    inverse = torch.cholesky_inverse(factor)
    floor = torch.maximum(rounding.max(), SOLVER * r.trace())  # the trace is no less than the largest eigenvalue
    if not bool(1 / inverse.norm() > floor):
        return None
    return 2 * factor.diagonal().log().sum(), inverse.diagonal()


def _by_eigenvalues(r: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
    """The same where eigenvalues (d,) are known, 0 for those that rounding hides; None if there is such a one."""
    return (values.log().sum(), torch.linalg.inv(r).diagonal()) if bool((values > 0).all()) else None


def shrunk(r: Tensor, n: Tensor) -> Tensor:
    """Correlations (d, d) of n (1,) rows shrunk towards 0, as far as chance explains their squares.

    Schaefer & Strimmer 2005, Stat. Appl. Genet. Mol. Biol. 4, 32, table 1, target D, with Var r of Gaussian rows.
    """
    squares = r.square().fill_diagonal_(0)
    chance = (1 - squares).square().fill_diagonal_(0).sum() / (n[0] - 1)
    share = (chance / squares.sum()).clamp_max(1).where(squares.sum() > 0, 0.0)
    return (1 - share) * r + share * torch.eye(len(r), dtype=r.dtype, device=r.device)
