"""Supernodes: the few units that carry the loss, what they write to, and who repeats them (2604.23475)."""

import math
from typing import Literal

import torch
from torch import Tensor

from nodelens.statistics.linalg import gaussian_information


def share_of(count: int, share: float, least: int = 1) -> int:
    """How many of ``count`` a share is, ``least`` at least: floor(share count + 1/2)."""
    return min(count, max(least, math.floor(share * count + 0.5)))


def largest(score: Tensor, k: int) -> Tensor:
    """Ascending ids of the k largest, ties to the lower id; NaN last. score (units,)."""
    order = torch.argsort(score.nan_to_num(-math.inf), descending=True, stable=True)
    return order[:k].sort().values


def connectivity(weights: Tensor, core: Tensor, topk: int = 256, mass: float | None = None) -> Tensor:
    """The share of what a unit writes that goes where the core writes, (units,).

    Formula: sum over h in H of |v_i[h]| / ||v_i||_1; H the ``topk`` largest a_h = sum over the core of |v_s[h]|, or the fewest that
             hold the share ``mass`` of them
    Shapes: weights (width, units), what reads the units; core (k,) ids -> (units,)
    Unit:   none, in [0, 1]; even weights: |H| / width
    NaN:    a unit that nothing reads
    Source: 2604.23475
    """
    size = weights.abs()
    return size[support(weights, core, topk, mass)].sum(0) / size.sum(0)


def support(weights: Tensor, core: Tensor, topk: int = 256, mass: float | None = None) -> Tensor:
    """Ascending ids of the places where the core writes most, ``topk`` or the fewest that hold the share ``mass``.

    weights (width, units), core (k,).
    """
    written = weights[:, core].abs().sum(1)
    if mass is not None:
        descending = written.sort(descending=True).values.cumsum(0)
        topk = int((descending < mass * descending[-1]).sum()) + 1
    return largest(written, min(topk, len(written)))


def halo(connected: Tensor, core: Tensor, fraction: float = 0.1) -> Tensor:
    """Ascending ids of the units outside the core that are connected to it most: ``fraction`` of them. connected (units,)."""
    outside = connected.clone()
    outside[core] = math.nan
    return largest(outside, share_of(len(connected) - len(core), fraction))


def redundancy_to_core(
    correlation: Tensor, topk: int = 5, reduce: Literal["topk_mean", "max"] = "topk_mean", positive: bool = True
) -> Tensor:
    """How much of a unit's part in the loss the core has already, (units,).

    Formula: mean of the ``topk`` largest (or the largest) of -0.5 ln(1 - rho^2), rho (below 0: 0 with ``positive``) the
             correlations with the core's units
    Shapes: correlation (units, core) of q = u dL/du over tokens -> (units,)
    Unit:   nats, >= 0; noise: 1 / (2 tokens)
    NaN:    a unit whose q does not vary
    Source: 2604.23475
    """
    rho = correlation.clamp_min(0) if positive else correlation
    information = gaussian_information(rho.square())
    k = 1 if reduce == "max" else min(topk, information.shape[1])
    return information.topk(k, dim=1).values.mean(1)


def protection(
    redundancy: Tensor,
    members: Tensor,
    rule: Literal["rank_power", "rank", "minmax"] = "rank_power",
    floor: float = 0.2,
    power: float = 8,
) -> Tensor:
    """What the redundancy of a halo's members leaves of their worth, (units,); 1 outside, and for a halo of one.

    Formula: rank_power f + (1 - f)(1 - r^g); rank 1 - r; r the ascending rank from 0 to 1, ties averaged; minmax
             1 - (R - min)/(max - min)
    Shapes: redundancy (units,), members (k,) ids -> (units,)
    Unit:   none, in [0, 1]
    NaN:    never; a member without a redundancy ranks first
    Source: 2604.23475
    """
    found = torch.ones_like(redundancy)
    if len(members) < 2:
        return found
    own = redundancy[members].nan_to_num(0)
    if rule == "minmax":
        spread = own.max() - own.min()
        found[members] = 1 - (own - own.min()) / spread if spread > 0 else torch.ones_like(own)
        return found
    below, equal = (own[:, None] > own).sum(1), (own[:, None] == own).sum(1)
    rank = (below + (equal - 1) / 2).to(own) / (len(members) - 1)
    found[members] = 1 - rank if rule == "rank" else floor + (1 - floor) * (1 - rank**power)
    return found


def concentration(score: Tensor, share: float = 0.01) -> float:
    """The share of a score's sum that the largest ``share`` of the units hold; ``share`` itself where all are alike. score >= 0."""
    values = score[score.isfinite()]
    return float(values.topk(share_of(len(values), share)).values.sum() / values.sum())


def concentration_curve(score: Tensor, points: int = 200) -> tuple[Tensor, Tensor]:
    """Shares of the units, and the shares of a score's sum that the largest of them hold, from (0, 0) to (1, 1); score >= 0.

    At most ``points`` places, evenly spaced in the logarithm of how many units they are. NaN where the sum is 0; NaNs are left out.
    """
    held = score[score.isfinite()].double().sort(descending=True).values.cumsum(0)
    n, zero = len(held), torch.zeros(1, dtype=torch.float64)
    if not n:
        return zero, zero
    counts = torch.logspace(0, math.log10(n), points, dtype=torch.float64).round().long().clamp(1, n).unique()
    return torch.cat([zero, counts.double() / n]), torch.cat([zero, held[counts - 1] / held[-1]])


def gini(score: Tensor) -> float:
    """Gini's coefficient of a score >= 0: 0 where all are alike, 1 - 1/n where one has all; NaN where the sum is 0."""
    values = score[score.isfinite()].double().sort().values
    n = len(values)
    place = 2 * torch.arange(1, n + 1, dtype=torch.float64) - n - 1
    return float((place @ values) / (n * values.sum()))


def correlations(shared: Tensor, a: Tensor, b: Tensor, eps: float = 0.0) -> Tensor:
    """Correlations of covariances (a units, b units) and variances (a units,), (b units,), in [-1, 1]; NaN where one is 0.

    No epsilon, for q = u dL/du varies by 1e-7 and less: ``eps`` under the root, 1e-8, gives the published code's number.
    """
    return (shared / (a[:, None] * b + eps).sqrt()).clamp(-1, 1)


def overlap(a: Tensor, b: Tensor) -> float:
    """Jaccard overlap of two sets of ids: shared over all; NaN of two empty ones."""
    one, other = set(a.tolist()), set(b.tolist())
    return len(one & other) / len(one | other) if one | other else math.nan
