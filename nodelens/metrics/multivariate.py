"""Information shared by all units of a layer: total correlation and related measures. Gaussian, in nats.

All are functions of the correlation matrix R of the units, computed from its determinant and its inverse.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from nodelens.statistics import Gram, NormedGram
from nodelens.statistics.linalg import correlation, entropy_bias, spectrum

from .base import Metric
from .information import constant_units
from .need import Need, View


class Entropies(NamedTuple):
    """Entropies of standardized units, up to constants: joint, and (negated) of each unit given the others."""

    whole: Tensor  # ()       0.5 ln det R
    rest: Tensor  # (units,) 0.5 ln P_ii, P the inverse of R; 0 where constant


@dataclass(frozen=True)
class TotalCorrelation(Metric):
    """Total dependence of the units of a layer: the sum of their entropies minus their joint entropy.

    Constant units are left out (``constant``). The estimate is biased upwards when there are few rows per unit. With more units
    than a third of the rows, ``shrinkage: auto`` shrinks the covariance towards equal variances (Ledoit-Wolf, ``shrunk``); the
    value then depends on the scales of the units. Dependent rows, such as positions of one image, count as fewer rows. ``bias:
    gaussian``, with ``shrinkage: none``, subtracts the bias of the plain estimate, which does not depend on the true value.

    Formula: TC = -0.5 ln det R, R the correlations of the units; ledoit_wolf: those of (1-a) S + a (tr S/N) I, S the covariance of
             the N units, a its shrinkage; bias: N h(1) - h(N), h(d) = 0.5 [sum_k psi((n-k)/2) + d ln(2/(n-1))], k = 1 .. d,
             n rows, psi digamma
    Shapes: y over rows of width units -> ()
    Unit:   nats, 0 and above; three units, all rho 0.5: 0.3466
    NaN:    fewer than two rows; R singular: collinear units, or without shrinkage no more rows than units
    Raises: ValueError for a bias correction with shrinkage
    Source: Watanabe 1960, IBM J. 4, 66; Rosas et al. 2019, 1902.11239, eq. 1; Ledoit & Wolf 2004, J. Multivar. Anal. 88, 365
    """

    names: ClassVar = ("total_correlation",)
    kind: ClassVar = "layer"
    nan: ClassVar = "fewer than two rows, or the units' correlations are singular"
    shrinkage: Literal["auto", "none", "ledoit_wolf"] = "auto"
    bias: Literal["none", "gaussian"] = "none"
    view: View = "positions"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias != "none" and self.shrinkage != "none":
            raise ValueError(f"{self.names[0]}: bias: gaussian is for the plain covariance only; set shrinkage: none with it")

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Gram if self.shrinkage == "none" else NormedGram, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Gram) -> Tensor:
        value = self._of(self._entropies(y), int((~constant_units(y)).sum()))
        return value - self._bias(y) if self.bias == "gaussian" else value

    def counts(self, weight: Tensor | None, y: Gram) -> dict[str, int]:
        return {"constant": int(constant_units(y).sum()), "shrunk": int(self._shrinks(y))}

    def _of(self, h: Entropies, units: int) -> Tensor:
        return -h.whole

    def _bias(self, y: Gram) -> Tensor:
        """The bias of the estimate: the same function, of the biases of the entropies."""
        units = int((~constant_units(y)).sum())
        whole, alone, others = (entropy_bias(y.n, d)[0] for d in (units, 1, max(0, units - 1)))
        return self._of(Entropies(whole - units * alone, (alone + others - whole) * ~constant_units(y)), units)

    def _shrinks(self, y: Gram) -> bool:
        units = int((~constant_units(y)).sum())
        return self.shrinkage == "ledoit_wolf" or (self.shrinkage == "auto" and units > int(y.n) / 3)

    def _entropies(self, y: Gram) -> Entropies:
        live = ~constant_units(y)
        covariance = y.covariance[live][:, live]
        if self._shrinks(y) and len(covariance):
            assert isinstance(y, NormedGram)
            covariance = shrunk(covariance, y.n, y.norm_square_sum)
        r = correlation(covariance, torch.zeros(len(covariance), dtype=torch.bool, device=covariance.device))
        values = spectrum(r, y.variance_rounding[live] / covariance.diagonal())
        rest = torch.zeros_like(y.shift)
        few = not self._shrinks(y) and int(y.n) <= len(r)
        if int(y.n) < 2 or few or not bool((values > 0).all()):
            return Entropies(values.new_full((), torch.nan), torch.full_like(rest, torch.nan).where(live | (y.n < 2), 0.0))
        rest[live] = 0.5 * torch.linalg.inv(r).diagonal().log()
        return Entropies(0.5 * values.log().sum(), rest)


@dataclass(frozen=True)
class DualTotalCorrelation(TotalCorrelation):
    """Joint entropy of the units of a layer minus the entropy of each unit given all others: the part of it that is shared.

    Options and caveats are those of total_correlation.

    Formula: DTC = 0.5 (ln det R + sum_i ln P_ii), R the correlations of the units, P its inverse; bias: N h(N-1) - (N-1) h(N),
             N units, h as in total_correlation
    Shapes: y over rows of width units -> ()
    Unit:   nats, 0 and above; three units, all rho 0.5: 0.2616
    NaN:    as in total_correlation
    Raises: ValueError for a bias correction with shrinkage
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
    Raises: ValueError for a bias correction with shrinkage
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
    Unit:   nats, 0 and above; three units, all rho 0.5: 0.6082
    NaN:    as in total_correlation
    Raises: ValueError for a bias correction with shrinkage
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
    Unit:   nats, 0 and above; three units, all rho 0.5: 0.2027
    NaN:    as in total_correlation
    Raises: ValueError for a bias correction with shrinkage
    Source: Whittaker 1990, Graphical Models in Applied Multivariate Statistics, section 5.8; Rosas et al. 2019, 1902.11239
    """

    names: ClassVar = ("multi_redundancy",)
    higher_is_better: ClassVar = False
    kind: ClassVar = "unit"

    def _of(self, h: Entropies, units: int) -> Tensor:
        return h.rest


def shrunk(covariance: Tensor, n: Tensor, quartic: Tensor) -> Tensor:
    """The Ledoit-Wolf covariance, (d, d): shrunk towards equal variances as far as noise explains their distance.

    quartic (1,) is the sum of |x - mean|^4 over n rows. J. Multivar. Anal. 88, 365 (2004), lemmas 3.2 to 3.4, with ddof 0 as there.
    """
    s = covariance * (n - 1) / n
    level = s.diagonal().mean()
    target = level * torch.eye(len(s), dtype=s.dtype, device=s.device)
    distance = (s - target).square().sum()
    chance = (quartic[0] / n[0] - s.square().sum()) / n[0]
    share = torch.where(distance > 0, chance / distance, 0.0).clamp(0, 1)
    return (1 - share) * s + share * target
