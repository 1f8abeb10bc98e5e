"""Which units go: a plan that can be read, compared and replayed."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch

from .criteria import generator

Mode = Literal["low", "high"]


@dataclass(frozen=True)
class RemovalPlan:
    """Removed units by layer, sorted; layers that lose none are absent."""

    removed: Mapping[str, Sequence[int]]

    @property
    def key(self) -> str:
        """A hash: equal plans, equal key."""
        text = json.dumps({k: list(v) for k, v in sorted(self.removed.items())})
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def count(self) -> int:
        return sum(len(units) for units in self.removed.values())


def check_removal(amount: float, mode: str) -> None:
    """Raises ValueError for an amount outside [0, 1) or an unknown mode."""
    if not 0 <= amount < 1:
        raise ValueError(f"amount is {amount}: a share of the units to remove, from 0 up to but not including 1")
    if mode not in ("low", "high"):
        raise ValueError(f"mode is {mode!r}: low removes the smallest scores, high the largest")


def remove(scored: pd.Series, amount: float, seed: int = 0, mode: Mode = "low", min_keep: int = 1) -> RemovalPlan:
    """The same share of every layer: floor(amount n + 1/2) units with the lowest (``high``: highest) score go.

    Ties are broken by a seeded permutation of the layer. A unit without a score (NaN) stays as long as others can go.
    ``min_keep`` units stay in every layer. Raises ValueError for an amount outside [0, 1) or an unknown mode.
    """
    check_removal(amount, mode)
    removed: dict[str, list[int]] = {}
    for layer, values in scored.groupby(level="layer", sort=False):
        n = len(values)
        count = min(math.floor(amount * n + 0.5), max(0, n - min_keep))
        order = torch.as_tensor(values.to_numpy() * (1 if mode == "low" else -1), dtype=torch.float64).nan_to_num(math.inf)
        shuffle = torch.randperm(n, generator=generator(seed, str(layer)))
        ranked = shuffle[torch.argsort(order[shuffle], stable=True)]
        if count:
            removed[str(layer)] = sorted(ranked[:count].tolist())
    return RemovalPlan(removed)
