"""What two units tell of a target together, and how it divides: shared, unique, synergy. Gaussian, minimum mutual information."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nodelens.statistics import Cross, Gram, Moments
from nodelens.statistics.linalg import gaussian_information

from .base import Metric, mean_of_partners
from .information import correlation_of, silent
from .need import Need, Target
from .paired_target import TWIN, beside_rows, check_target, target_rows, whitening, with_permutations, with_targets


@dataclass(frozen=True)
class Synergy(Metric):
    """What two units tell of a target beyond the better of them: I(z; y_i, y_j) - max(I(z; y_i), I(z; y_j)), ALL pairs.

    Where 1 - rho_ij^2 < 1e-6 a twin adds nothing: 0, counted as ``twins``. Targets as in mutual_information_gaussian. Several
    target columns: what is told of them together (``target_reduce: joint``), or each information averaged over them before
    max and difference (``mean``); with several this is not the only decomposition. A maximum is biased: take the jackknife's
    bias. ``permutations`` adds the null of a permuted target.

    Formula: S_ij = I_ij - max(I_i, I_j); one target z: 0.5 ln[(1 - max(r_i^2, r_j^2))/(1 - R_ij^2)], R_ij^2 = (r_i^2 + r_j^2
             - 2 r_i r_j rho_ij)/(1 - rho_ij^2), r = corr(y, z), rho_ij = corr(y_i, y_j); several, whitened:
             I_ij = -0.5 ln det(I - B'R_ij^-1 B), B the correlations of the two units with them, R_ij = [[1, rho_ij], [rho_ij, 1]]
    Shapes: y over rows of width units, z of them with the target -> (units,) or (units, units)
    Unit:   nats, in [0, 6.908], twice that for several columns; z = y_1 + y_2 + e, all N(0, 1): 0.3466
    NaN:    fewer than two samples; the mean of a layer of one unit
    Raises: ValueError for an unknown target, and when labels or logits that it is made of are missing
    Source: Barrett 2015, Phys. Rev. E 91, 052802, 1411.2832, section IV (minimum mutual information)
    """

    names: ClassVar = ("pid_synergy", "synergy")
    kind: ClassVar = "pair"
    nan: ClassVar = "fewer than two samples, or a layer of one unit"
    target: Target = "auto"
    reduce: Literal["mean", "none"] = "mean"
    target_reduce: Literal["joint", "mean"] = "joint"
    permutations: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_target(self.names[0], self.target, self.permutations)

    def needs(self) -> dict[str, Need]:
        target = beside_rows(self.target)
        needs = {"y": Need(Gram, "output", "samples"), "z": Need(Cross, "output", "samples", target)}
        return with_permutations(needs, self.permutations, target)

    def __call__(self, weight: Tensor | None, y: Gram, z: Cross, **_: Any) -> Tensor:
        rho, r = correlation_of(y), _correlations(y.moments, z, self.target, self.target_reduce)
        single = _single(r, self.target_reduce)
        better = torch.maximum(single[:, None], single)
        pairs = (_joint(rho, r, self.target_reduce) - better).where(_distinct(rho) | ~rho.isfinite(), 0).fill_diagonal_(0)
        return mean_of_partners(pairs) if self.reduce == "mean" else pairs

    def counts(self, weight: Tensor | None, y: Gram, z: Cross, **_: Any) -> dict[str, int]:
        twins = torch.triu(~_distinct(correlation_of(y)), 1)
        return {"constant": int(silent(y).sum()), "twins": int(twins.sum()), "without_target": int(y.n - z.n)}


@dataclass(frozen=True)
class SharedInformation(Metric):
    """What both of two units tell of a target: the lesser of their informations, ALL pairs.

    With what is unique to each (pid_unique) and the synergy it adds up to the information of both. Options as in synergy.

    Formula: min(I_i, I_j), I_i = -0.5 ln(1 - r_i^2), r_i = corr(y_i, z); several target columns, whitened: r_i^2 summed over them
    Shapes: y over rows of width units, z of them with the target -> (units,) or (units, units)
    Unit:   nats, in [0, 6.908]; z = y_1 + y_2 + e, all N(0, 1): 0.2027
    NaN:    fewer than two samples; the mean of a layer of one unit
    Raises: ValueError for an unknown target, and when labels or logits that it is made of are missing
    Source: Barrett 2015, Phys. Rev. E 91, 052802, 1411.2832, section IV (minimum mutual information)
    """

    names: ClassVar = ("pid_redundancy",)
    kind: ClassVar = "pair"
    nan: ClassVar = "fewer than two samples, or a layer of one unit"
    higher_is_better: ClassVar = False
    target: Target = "auto"
    reduce: Literal["mean", "none"] = "mean"
    target_reduce: Literal["joint", "mean"] = "joint"
    permutations: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_target(self.names[0], self.target, self.permutations)

    def needs(self) -> dict[str, Need]:
        target = beside_rows(self.target)
        needs = {"y": Need(Moments, "output", "samples"), "z": Need(Cross, "output", "samples", target)}
        return with_permutations(needs, self.permutations, target)

    def __call__(self, weight: Tensor | None, y: Moments, z: Cross, **_: Any) -> Tensor:
        single = _single(_correlations(y, z, self.target, self.target_reduce), self.target_reduce)
        pairs = self._of(single, torch.minimum(single[:, None], single)).fill_diagonal_(0)
        return mean_of_partners(pairs) if self.reduce == "mean" else pairs

    def counts(self, weight: Tensor | None, y: Moments, z: Cross, **_: Any) -> dict[str, int]:
        return {"constant": int(silent(y).sum()), "without_target": int(y.n - z.n)}

    def _of(self, single: Tensor, shared: Tensor) -> Tensor:
        return shared


@dataclass(frozen=True)
class UniqueInformation(SharedInformation):
    """What a unit tells of a target that its partner does not, I_i - min(I_i, I_j), ALL pairs.

    Row i, column j: what unit i tells and unit j does not. Options as in synergy.

    Formula: I_i - min(I_i, I_j), I_i = -0.5 ln(1 - r_i^2), r_i = corr(y_i, z); several target columns, whitened: r_i^2 summed
             over them
    Shapes: y over rows of width units, z of them with the target -> (units,) or (units, units)
    Unit:   nats, in [0, 6.908]; z = y_1 + y_2 + e, all N(0, 1): 0
    NaN:    fewer than two samples; the mean of a layer of one unit
    Raises: ValueError for an unknown target, and when labels or logits that it is made of are missing
    Source: Barrett 2015, Phys. Rev. E 91, 052802, 1411.2832, section IV (minimum mutual information)
    """

    names: ClassVar = ("pid_unique",)
    higher_is_better: ClassVar = True

    def _of(self, single: Tensor, shared: Tensor) -> Tensor:
        return single[:, None] - shared


def _correlations(y: Moments, z: Cross, target: Target, reduce: str) -> Tensor:
    """Correlations of units with a target's columns, or with what of them is uncorrelated, (units, t)."""
    z = target_rows(z, target)
    r = with_targets(y, z)
    return r @ whitening(z) if reduce == "joint" else r


def _single(r: Tensor, reduce: str) -> Tensor:
    """Information of each unit with the target, (units,)."""
    return gaussian_information(r.square().sum(1)) if reduce == "joint" else gaussian_information(r.square()).mean(1)


def _distinct(rho: Tensor) -> Tensor:
    return 1 - rho.square() >= TWIN


def _joint(rho: Tensor, r: Tensor, reduce: str) -> Tensor:
    """Information of each pair of units with the target, (units, units)."""
    if reduce == "joint":
        return _together(rho, r)
    total = torch.zeros_like(rho)
    for column in r.split(1, 1):  # few: one, or the columns of a given target
        total += _together(rho, column)
    return total / r.shape[1]


def _together(rho: Tensor, b: Tensor) -> Tensor:
    """-0.5 ln det(I - B'R^-1 B) of each pair, from the two canonical correlations it has: (units, units), (units, t) uncorrelated.

    Their squares are the roots of k^2 - trace k + minor, trace and minor those of R^-1 BB', which is 2 x 2 whatever t.
    """
    gap, shared = (1 - rho.square()).clamp_min(TWIN), b @ b.T
    own = shared.diagonal()
    trace = (own[:, None] + own - 2 * rho * shared) / gap
    if b.shape[1] < 2:
        return gaussian_information(trace)
    minor = (own.outer(own) - shared.square()) / gap
    root = (trace.square() / 4 - minor).clamp_min(0).sqrt()
    return gaussian_information(trace / 2 + root) + gaussian_information((trace / 2 - root).clamp_min(0))


METRICS: tuple[type[Metric], ...] = (Synergy, SharedInformation, UniqueInformation)
