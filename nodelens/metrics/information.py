"""What units tell: about each other, and together about a target. Gaussian, in nats."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..linalg import MI_CEILING, constant, correlation, gaussian_information
from ..statistics import Cross, Gram
from .base import Metric, Need, View, mean_of_partners

TWIN = 1e-6  # of 1 - rho^2: below, a partner adds nothing


@dataclass(frozen=True)
class PairwiseRedundancy(Metric):
    """Gaussian mutual information of two units' activations, -0.5 ln(1 - rho_ij^2), over ALL pairs.

    ``reduce: mean`` is the mean over the N - 1 partners, a value a unit; ``none`` the matrix, its diagonal 0. A unit that
    does not vary tells nothing: 0, counted as ``constant``; pairs at the ceiling are counted as ``saturated``.
    Independent units read about 1/(2n), not 0: rows that are positions of one image count for less than n.

    Shapes: y over rows of width units -> (units,) or (units, units)
    Unit:   nats, in [0, 6.908]; rho = 0.6: 0.2231
    NaN:    fewer than two rows; the mean of a layer of one unit
    Source: Cover & Thomas 2006, Elements of Information Theory, ch. 8
    """

    names: ClassVar = ("pairwise_redundancy_gaussian", "redundancy")
    kind: ClassVar = "pair"
    nan: ClassVar = "fewer than two rows, or a layer of one unit"
    reduce: Literal["mean", "none"] = "mean"
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Gram, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Gram) -> Tensor:  # type: ignore[override]
        pairs = gaussian_information(correlation_of(y).square()).fill_diagonal_(0)
        return mean_of_partners(pairs) if self.reduce == "mean" else pairs

    def counts(self, weight: Tensor | None, y: Gram) -> dict[str, int]:  # type: ignore[override]
        at_ceiling = torch.triu(correlation_of(y).square() >= MI_CEILING, 1)
        return {"constant": int(silent(y).sum()), "saturated": int(at_ceiling.sum())}


@dataclass(frozen=True)
class Synergy(Metric):
    """What two units tell of a target beyond the better of them: I(z; y_i, y_j) - max(I(z; y_i), I(z; y_j)), ALL pairs.

    With Gaussian variables 0.5 ln[(1 - max(r_i^2, r_j^2))/(1 - R_ij^2)], R_ij^2 = (r_i^2 + r_j^2 - 2 r_i r_j rho_ij)
    / (1 - rho_ij^2), r the correlations with z. Where 1 - rho_ij^2 < 1e-6 a twin adds nothing: 0, counted as ``twins``.
    Targets, a value a sample: the logit margin z_y - max_{k != y} z_k, the correct logit, the centred logits on their
    first principal axis, the sample's loss, or ``given``. Several target columns: each information is averaged over them
    before max and difference (``target_reduce: mean``). With several targets this is not the only decomposition.

    Shapes: y over rows of width units, z of them with the target -> (units,) or (units, units)
    Unit:   nats, in [0, 6.908]; z = y_1 + y_2 + e, all N(0, 1): 0.3466
    NaN:    fewer than two samples; the mean of a layer of one unit
    Raises: ValueError when labels or logits that the target is made of are missing
    Source: Barrett 2015, Phys. Rev. E 91, 052802, 1411.2832, section IV (minimum mutual information)
    """

    names: ClassVar = ("gaussian_pid_synergy_mmi", "synergy", "synergy_continuous_target")
    kind: ClassVar = "pair"
    nan: ClassVar = "fewer than two samples, or a layer of one unit"
    target: Literal["logit_margin", "correct_logit", "logit_pc1", "loss", "given"] = "logit_margin"
    reduce: Literal["mean", "none"] = "mean"
    target_reduce: Literal["mean"] = "mean"

    def needs(self) -> dict[str, Need]:
        target = "logits" if self.target == "logit_pc1" else self.target
        return {"y": Need(Gram, "output", "samples"), "z": Need(Cross, "output", "samples", target)}

    def __call__(self, weight: Tensor | None, y: Gram, z: Cross) -> Tensor:  # type: ignore[override]
        rho, r = correlation_of(y), self._with_target(y, z)
        pairs = torch.zeros_like(rho)
        for column in r.T:  # few: one, or the columns of a given target
            pairs += _joint(rho, column)
        single = gaussian_information(r.square()).mean(1)
        pairs = (pairs / r.shape[1] - torch.maximum(single[:, None], single)).fill_diagonal_(0)
        pairs = pairs.where(_distinct(rho) | ~rho.isfinite(), 0)
        return mean_of_partners(pairs) if self.reduce == "mean" else pairs

    def counts(self, weight: Tensor | None, y: Gram, z: Cross) -> dict[str, int]:  # type: ignore[override]
        twins = torch.triu(~_distinct(correlation_of(y)), 1)
        return {"constant": int(silent(y).sum()), "twins": int(twins.sum())}

    def _with_target(self, y: Gram, z: Cross) -> Tensor:
        """Correlations of units with the target's columns, (units, t)."""
        if self.target == "logit_pc1":
            covariance = z.target_covariance
            if not covariance.isfinite().all():
                return torch.full_like(z.cross[:, :1], torch.nan)
            z = z.project(torch.linalg.eigh(covariance).eigenvectors[:, -1:])
        variance, target = y.covariance.diagonal(), z.target_covariance.diagonal()
        live = ~silent(y)[:, None] & ~constant(target, z.target_mean)
        scale = variance[:, None].where(live, 1.0).sqrt() * target.where(live, 1.0).sqrt()
        r = torch.where(live, z.covariance / scale, 0.0)
        return r.where((y.n > 1) & (z.n > 1), torch.nan)


def silent(y: Gram) -> Tensor:
    """Units that do not vary, (units,) bool."""
    return constant(y.covariance.diagonal(), y.mean)


def correlation_of(y: Gram) -> Tensor:
    """Correlations of a Gram, (units, units): 0 for units that do not vary, NaN below two rows."""
    rho = correlation(y.covariance, silent(y))
    return rho.where(y.n > 1, torch.nan)


def _distinct(rho: Tensor) -> Tensor:
    return 1 - rho.square() >= TWIN


def _joint(rho: Tensor, r: Tensor) -> Tensor:
    """Information of each pair of units with one target column, (units, units)."""
    r2 = r.square()
    explained = (r2[:, None] + r2 - 2 * r[:, None] * r * rho) / (1 - rho.square()).clamp_min(TWIN)
    return gaussian_information(explained)
