"""Robustness of supernodes to the choice of texts: resamples from sums by group of samples, without another pass."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nodelens.metrics.supernode import largest, overlap, share_of
from nodelens.statistics.sample_hash import generator

from .agreement import spearman

Resample = Literal["halves", "bootstrap"]
DRAWS = 200  # of a bootstrap interval
FEWEST_GROUPS = 4  # of samples, for a bootstrap interval


def resample_scores(
    name: str, square: Tensor, rows: Tensor, fraction: float, draws: int, how: Resample = "halves", seed: int = 0
) -> list[dict[str, Any]]:
    """One row per draw: Jaccard index of two sets of supernodes, Spearman correlation of two loss proxies, from sums by group.

    square (groups, units), sums of q^2; rows (groups,). ``halves``: two random halves of the groups are compared. Each has half
    the data, so they agree less than two samples of full size. ``bootstrap``: groups drawn with replacement are compared with
    all groups.
    """
    found = []
    some = rows > 0
    square, rows = square[some], rows[some]
    for draw, (a, b) in enumerate(_weights(len(rows), draws, how, seed)):
        if not float(a @ rows) or not float(b @ rows):
            continue
        one, other = (0.5 * (w @ square) / (w @ rows) for w in (a, b))
        k = share_of(square.shape[1], fraction)
        jaccard = overlap(largest(one, k), largest(other, k))
        found.append({"layer": name, "draw": draw, "jaccard": jaccard, "spearman": spearman(one, other)})
    return found


def bootstrap_intervals(
    scores: Mapping[str, Tensor], square: Tensor, rows: Tensor, supernodes: Tensor, seed: int = 0, level: float = 0.95
) -> dict[str, float]:
    """Percentile bootstrap intervals of the agreement of the loss proxy with other scores, over groups of samples.

    For each score: ``jaccard_<score>_low`` and ``_high``, of the Jaccard index of the largest units by both, and the same of the
    rank correlation, ``spearman_<score>``. The loss proxy is drawn again, the other scores are kept as they are. Each draw has
    the noise of the samples twice, so that a noisy proxy lies near the upper end. NaN for fewer than four groups with samples;
    that of the Jaccard index also where the supernodes are not the largest units by the loss proxy.

    Shapes: scores (units,) each; square (groups, units), sums of q^2; rows (groups,); supernodes (k,), ids
    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, section 13.3
    """
    some = rows > 0
    square, rows = square[some], rows[some]
    draws = DRAWS if len(rows) >= FEWEST_GROUPS else 0
    rows = rows.double()
    proxies = [weights @ square / (weights @ rows) for weights, _ in _weights(len(rows), draws, "bootstrap", seed)]
    k = len(supernodes)
    found: dict[str, float] = {}
    by_proxy = overlap(largest(square.sum(0), k), supernodes) == 1
    for name, values in scores.items():
        top = largest(values, k)
        measures = {
            "jaccard": [overlap(largest(proxy, k), top) for proxy in proxies if by_proxy],
            "spearman": [spearman(proxy, values) for proxy in proxies],
        }
        for measure, drawn in measures.items():
            ends = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]) if drawn else [np.nan, np.nan]
            found |= {f"{measure}_{name}_low": float(ends[0]), f"{measure}_{name}_high": float(ends[1])}
    return found


def chance_jaccard(n: int, k: int) -> float:
    """Jaccard index of two random sets of k of n units, at the expected size of their intersection."""
    return (k * k / n) / (2 * k - k * k / n)


def _weights(groups: int, draws: int, how: Resample, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights of the groups in the two samples to compare, (groups,) each."""
    for draw in range(draws if groups > 1 else 0):
        chance = generator(seed, "resample", str(draw))  # the same groups in every layer
        if how == "halves":
            first = torch.zeros(groups, dtype=torch.float64)
            first[torch.randperm(groups, generator=chance)[: groups // 2]] = 1
            yield first, 1 - first
        else:
            drawn = torch.randint(groups, (groups,), generator=chance)
            yield torch.bincount(drawn, minlength=groups).double(), torch.ones(groups, dtype=torch.float64)
