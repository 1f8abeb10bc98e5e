"""Whether other texts name the same supernodes: resamples made of sums by group of samples, without a further pass."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from nodelens.metrics.core_and_halo import largest, overlap, share_of
from nodelens.statistics.sample_hash import generator

from .agreement import spearman

Resample = Literal["halves", "bootstrap"]


def resampled(
    name: str, square: Tensor, rows: Tensor, core: float, draws: int, how: Resample = "halves", seed: int = 0
) -> list[dict[str, Any]]:
    """A row a draw: Jaccard overlap of two cores and Spearman correlation of two loss proxies, from sums by group.

    square (groups, units) of q^2, rows (groups,). ``halves``: the groups in two random halves, one against the other; each has
    half the data, so the agreement is less than that of two texts as long as the whole. ``bootstrap``: groups drawn with
    replacement, against the whole.
    """
    found = []
    some = rows > 0
    square, rows = square[some], rows[some]
    for draw, (a, b) in enumerate(_weights(len(rows), draws, how, seed)):
        if not float(a @ rows) or not float(b @ rows):
            continue
        one, other = (0.5 * (w @ square) / (w @ rows) for w in (a, b))
        k = share_of(square.shape[1], core)
        jaccard = overlap(largest(one, k), largest(other, k))
        found.append({"layer": name, "draw": draw, "jaccard": jaccard, "spearman": spearman(one, other)})
    return found


def by_chance(n: int, k: int) -> float:
    """The Jaccard overlap of two random sets of k of n units, at the expected size of what they share."""
    return (k * k / n) / (2 * k - k * k / n)


def _weights(groups: int, draws: int, how: Resample, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """How often each group counts in the two samples that are compared, (groups,) each."""
    for draw in range(draws if groups > 1 else 0):
        chance = generator(seed, "resample", str(draw))  # the same texts in every layer
        if how == "halves":
            first = torch.zeros(groups, dtype=torch.float64)
            first[torch.randperm(groups, generator=chance)[: groups // 2]] = 1
            yield first, 1 - first
        else:
            drawn = torch.randint(groups, (groups,), generator=chance)
            yield torch.bincount(drawn, minlength=groups).double(), torch.ones(groups, dtype=torch.float64)
