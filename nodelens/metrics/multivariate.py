"""What many units share: total correlation and its kin. Gaussian, in nats.

All are functions of the units' correlations R: what it takes to know them is one determinant and one inverse.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from nodelens.statistics import Gram, NormedGram
from nodelens.statistics.linalg import correlation, entropy_bias, spectrum

from .base import Metric
from .information import silent
from .need import Need, View


class Entropies(NamedTuple):
    """What all units of a layer leave open together and alone."""

    whole: Tensor  # ()       0.5 ln det R
    rest: Tensor  # (units,) 0.5 ln P_ii, P the inverse of R: what the others tell of each; 0 where it does not vary


@dataclass(frozen=True)
class TotalCorrelation(Metric):
    """How much less the units of a layer leave open together than one by one.

    Units that do not vary tell nothing and are left out, ``constant``. With few rows a unit the correlations say too much:
    ``shrinkage: auto`` draws the covariance towards equal variances (Ledoit-Wolf) where the layer has more units than a
    third of the rows, ``shrunk``; it then depends on the units' scales. Rows that are positions of one image count for less.
    ``bias: gaussian``, with shrinkage none, subtracts what the plain estimate reads too much, whatever the truth.

    Formula: TC = -0.5 ln det R, R the correlations of the units; ledoit_wolf: those of (1-a) S + a (tr S/N) I, S the covariance of
             the N units, a its shrinkage; bias: N h(1) - h(N), h(d) = 0.5 [sum_k psi((n-k)/2) + d ln(2/(n-1))], k = 1 .. d,
             n rows, psi digamma
    Shapes: y over rows of width units -> ()
    Unit:   nats, 0 and above; three units, all rho 0.5: 0.3466
    NaN:    fewer than two rows; R singular: units that follow from others, or no more rows than units without shrinkage
    Raises: ValueError for a bias with shrinkage
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
            raise ValueError(f"{self.names[0]}: bias: gaussian is of the plain covariance; set shrinkage: none with it")

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Gram if self.shrinkage == "none" else NormedGram, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Gram) -> Tensor:
        value = self._of(self._entropies(y), int((~silent(y)).sum()))
        return value - self._lean(y) if self.bias == "gaussian" else value

    def counts(self, weight: Tensor | None, y: Gram) -> dict[str, int]:
        return {"constant": int(silent(y).sum()), "shrunk": int(self._shrinks(y))}

    def _of(self, h: Entropies, units: int) -> Tensor:
        return -h.whole

    def _lean(self, y: Gram) -> Tensor:
        """What the estimate reads too much: the same sum, of the biases of the entropies."""
        units = int((~silent(y)).sum())
        whole, alone, others = (entropy_bias(y.n, d)[0] for d in (units, 1, max(0, units - 1)))
        return self._of(Entropies(whole - units * alone, (alone + others - whole) * ~silent(y)), units)

    def _shrinks(self, y: Gram) -> bool:
        units = int((~silent(y)).sum())
        return self.shrinkage == "ledoit_wolf" or (self.shrinkage == "auto" and units > int(y.n) / 3)

    def _entropies(self, y: Gram) -> Entropies:
        live = ~silent(y)
        covariance = y.covariance[live][:, live]
        if self._shrinks(y) and len(covariance):
            assert isinstance(y, NormedGram)
            covariance = shrunk(covariance, y.n, y.norm_square_sum)
        r = correlation(covariance, torch.zeros(len(covariance), dtype=torch.bool, device=covariance.device))
        values = spectrum(r)
        rest = torch.zeros_like(y.shift)
        few = not self._shrinks(y) and int(y.n) <= len(r)
        if int(y.n) < 2 or few or not bool((values > 0).all()):
            return Entropies(values.new_full((), torch.nan), torch.full_like(rest, torch.nan).where(live | (y.n < 2), 0.0))
        rest[live] = 0.5 * torch.linalg.inv(r).diagonal().log()
        return Entropies(0.5 * values.log().sum(), rest)


@dataclass(frozen=True)
class DualTotalCorrelation(TotalCorrelation):
    """How much of what the units of a layer leave open together is shared: all but what each alone has to itself.

    Options, and when it misleads, as in total_correlation.

    Formula: DTC = 0.5 (ln det R + sum_i ln P_ii), R the correlations of the units, P its inverse; bias: N h(N-1) - (N-1) h(N),
             N units, h as in total_correlation
    Shapes: y over rows of width units -> ()
    Unit:   nats, 0 and above; three units, all rho 0.5: 0.2616
    NaN:    as total_correlation
    Raises: ValueError for a bias with shrinkage
    Source: Han 1978, Inf. Control 36, 133; Rosas et al. 2019, 1902.11239, eq. 2
    """

    names: ClassVar = ("dual_total_correlation",)

    def _of(self, h: Entropies, units: int) -> Tensor:
        return h.whole + h.rest.sum()


@dataclass(frozen=True)
class OInformation(TotalCorrelation):
    """Whether the units of a layer say the same (above 0) or something only together (below 0).

    Options, and when it misleads, as in total_correlation.

    Formula: O = TC - DTC = -ln det R - 0.5 sum_i ln P_ii, R the correlations of the units, P its inverse
    Shapes: y over rows of width units -> ()
    Unit:   nats; three units, all rho 0.5: 0.0849; y_3 = y_1 + y_2 + e, all N(0, 1): -0.1438; one unit or two: 0
    NaN:    as total_correlation
    Raises: ValueError for a bias with shrinkage
    Source: Rosas et al. 2019, Phys. Rev. E 100, 032305, 1902.11239, eq. 3
    """

    names: ClassVar = ("o_information",)

    def _of(self, h: Entropies, units: int) -> Tensor:
        return -2 * h.whole - h.rest.sum()


@dataclass(frozen=True)
class SInformation(TotalCorrelation):
    """How much each unit of a layer shares with all the others, summed over the units.

    Options, and when it misleads, as in total_correlation.

    Formula: S = TC + DTC = 0.5 sum_i ln P_ii, P the inverse of the units' correlations
    Shapes: y over rows of width units -> ()
    Unit:   nats, 0 and above; three units, all rho 0.5: 0.6082
    NaN:    as total_correlation
    Raises: ValueError for a bias with shrinkage
    Source: Rosas et al. 2019, 1902.11239, section II; James, Ellison & Crutchfield 2011, Chaos 21, 037109
    """

    names: ClassVar = ("s_information",)

    def _of(self, h: Entropies, units: int) -> Tensor:
        return h.rest.sum()


@dataclass(frozen=True)
class MultiRedundancy(TotalCorrelation):
    """What all the other units of its layer tell of a unit.

    A unit that does not vary has 0. Options, and when it misleads, as in total_correlation.

    Formula: 0.5 ln P_ii, P the inverse of the units' correlations; bias: h(1) + h(N-1) - h(N), N units, h as in total_correlation
    Shapes: y over rows of width units -> (units,)
    Unit:   nats, 0 and above; three units, all rho 0.5: 0.2027
    NaN:    as total_correlation
    Raises: ValueError for a bias with shrinkage
    Source: Whittaker 1990, Graphical Models in Applied Multivariate Statistics, section 5.8; Rosas et al. 2019, 1902.11239
    """

    names: ClassVar = ("multi_redundancy",)
    higher_is_better: ClassVar = False
    kind: ClassVar = "unit"

    def _of(self, h: Entropies, units: int) -> Tensor:
        return h.rest


def shrunk(covariance: Tensor, n: Tensor, quartic: Tensor) -> Tensor:
    """Ledoit and Wolf's covariance, (d, d): drawn towards equal variances as far as chance explains that it differs from it.

    quartic (1,), the sum of |x - mean|^4 over the n rows. J. Multivar. Anal. 88, 365 (2004), lemmas 3.2 to 3.4, ddof 0 as there.
    """
    s = covariance * (n - 1) / n
    level = s.diagonal().mean()
    target = level * torch.eye(len(s), dtype=s.dtype, device=s.device)
    distance = (s - target).square().sum()
    chance = (quartic[0] / n[0] - s.square().sum()) / n[0]
    share = torch.where(distance > 0, chance / distance, 0.0).clamp(0, 1)
    return (1 - share) * s + share * target


METRICS: tuple[type[Metric], ...] = (TotalCorrelation, DualTotalCorrelation, OInformation, SInformation, MultiRedundancy)
