"""Formulas for supernodes (2604.23475): the few units with most of the loss proxy, and the halo of units redundant with them."""

import math
from typing import Literal

import torch
from torch import Tensor

from nodelens.statistics.linalg import gaussian_information


def share_of(count: int, share: float, least: int = 1) -> int:
    """The number of units in a share of ``count``, at least ``least``: floor(share count + 1/2)."""
    return min(count, max(least, math.floor(share * count + 0.5)))


def largest(score: Tensor, k: int) -> Tensor:
    """Ascending ids of the k largest scores; ties go to the lower id, NaN is last. score (units,)."""
    order = torch.argsort(score.nan_to_num(-math.inf), descending=True, stable=True)
    return order[:k].sort().values


def connectivity(weights: Tensor, supernodes: Tensor, topk: int = 256, mass: float | None = None) -> Tensor:
    """Share of a unit's outgoing weight that goes to the outputs to which the supernodes write, (units,).

    Formula: sum over h in H of |v_i[h]| / ||v_i||_1; H the outputs with the ``topk`` largest a_h = sum over supernodes of |v_s[h]|,
             or the fewest outputs with the share ``mass`` of their sum
    Shapes: weights (width, units), the weights that read the units; supernodes (k,) ids -> (units,)
    Unit:   none, in [0, 1]; equal weights: |H| / width
    NaN:    a unit whose outgoing weights are all zero
    Source: 2604.23475
    """
    size = weights.abs()
    return size[support(weights, supernodes, topk, mass)].sum(0) / size.sum(0)


def support(weights: Tensor, supernodes: Tensor, topk: int = 256, mass: float | None = None) -> Tensor:
    """Ascending ids of the outputs to which the supernodes write most: ``topk``, or the fewest that have the share ``mass``.

    weights (width, units), supernodes (k,).
    """
    written = weights[:, supernodes].abs().sum(1)
    if mass is not None:
        descending = written.sort(descending=True).values.cumsum(0)
        topk = int((descending < mass * descending[-1]).sum()) + 1
    return largest(written, min(topk, len(written)))


def halo(connectivity: Tensor, supernodes: Tensor, fraction: float = 0.1) -> Tensor:
    """Ascending ids of the halo: the ``fraction`` of other units with the largest connectivity (units,) to the supernodes."""
    outside = connectivity.clone()
    outside[supernodes] = math.nan
    return largest(outside, share_of(len(connectivity) - len(supernodes), fraction))


def redundancy_to_supernodes(
    correlation: Tensor, topk: int = 5, reduce: Literal["topk_mean", "max"] = "topk_mean", positive: bool = True
) -> Tensor:
    """Information that a unit's effect on the loss shares with that of the supernodes, (units,).

    Formula: mean of the ``topk`` largest (or the largest) of -0.5 ln(1 - rho^2), rho the correlations with the supernodes,
             negative ones set to 0 with ``positive``
    Shapes: correlation (units, supernodes) of q = u dL/du over tokens -> (units,)
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
    """Factor that lowers the score of redundant halo units, (units,); 1 outside the halo, and for a halo of one unit.

    Formula: rank_power f + (1 - f)(1 - r^g); rank 1 - r; r the ascending rank from 0 to 1, ties averaged; minmax
             1 - (R - min)/(max - min)
    Shapes: redundancy (units,), members (k,) ids -> (units,)
    Unit:   none, in [0, 1]
    NaN:    never; a member without a redundancy counts as 0
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
    """Share of the score's sum in the ``share`` of units with the largest scores; ``share`` itself for equal scores. score >= 0."""
    values = score[score.isfinite()]
    return float(values.topk(share_of(len(values), share)).values.sum() / values.sum())


def concentration_curve(score: Tensor, points: int = 200) -> tuple[Tensor, Tensor]:
    """Share of the units, largest first, against their share of the score's sum, from (0, 0) to (1, 1); score >= 0.

    At most ``points`` points, evenly spaced in the logarithm of the number of units. NaN scores are ignored; a sum of 0 gives NaN.
    """
    held = score[score.isfinite()].double().sort(descending=True).values.cumsum(0)
    n, zero = len(held), torch.zeros(1, dtype=torch.float64)
    if not n:
        return zero, zero
    counts = torch.logspace(0, math.log10(n), points, dtype=torch.float64).round().long().clamp(1, n).unique()
    return torch.cat([zero, counts.double() / n]), torch.cat([zero, held[counts - 1] / held[-1]])


def gini(score: Tensor) -> float:
    """Gini coefficient of a score >= 0: 0 for equal scores, 1 - 1/n if one unit has the whole sum; NaN for a sum of 0."""
    values = score[score.isfinite()].double().sort().values
    n = len(values)
    place = 2 * torch.arange(1, n + 1, dtype=torch.float64) - n - 1
    return float((place @ values) / (n * values.sum()))


def correlations(shared: Tensor, a: Tensor, b: Tensor, eps: float = 0.0) -> Tensor:
    """Correlations from covariances (a units, b units) and variances (a units,), (b units,), in [-1, 1]; NaN for a variance of 0.

    There is no epsilon by default, because the variance of q = u dL/du may be 1e-7 or less. ``eps`` = 1e-8 is added under the root
    in the published code.
    """
    return (shared / (a[:, None] * b + eps).sqrt()).clamp(-1, 1)


def overlap(a: Tensor, b: Tensor) -> float:
    """Jaccard index of two sets of ids: intersection over union; NaN for two empty sets."""
    one, other = set(a.tolist()), set(b.tolist())
    return len(one & other) / len(one | other) if one | other else math.nan
