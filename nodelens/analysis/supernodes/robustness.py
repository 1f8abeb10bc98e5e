"""Robustness of supernodes to the choice of texts: resamples from sums by group of samples, without another pass."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from nodelens.metrics.supernode import largest, overlap, share_of
from nodelens.statistics.sample_hash import generator

from .agreement import spearman

Resample = Literal["halves", "bootstrap"]


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
