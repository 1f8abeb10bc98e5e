"""Controls of the redundancy to supernodes: random sets of the same size, and matched units outside the halo."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nodelens.statistics.sample_hash import generator

_FLIPS = 999  # sign flips for the p-value of a mean difference
RANDOM = "random core"  # a value of the column control in saved tables
COLUMNS = ("layer", "control", "quantity", "halo", "other", "difference", "se", "p", "n")


@dataclass(frozen=True)
class ControlSets:
    """Ids of units to compare in a group: supernodes (k,), halo (h,), random (draws, k), pairs (halo, matched) (pairs, 2).

    mutual: whether the units of the halo are compared with each other, too.
    """

    supernodes: Tensor
    halo: Tensor
    random: Tensor
    pairs: Tensor
    mutual: bool = False

    @classmethod
    def of(
        cls, name: str, proxy: Tensor, supernodes: Tensor, halo: Tensor, draws: int, seed: int, mutual: bool = False
    ) -> "ControlSets":
        """Random sets are drawn from the units outside supernodes and halo; there are none if these are too few."""
        outside, k = _outside(len(proxy), supernodes, halo), len(supernodes)
        every = [outside[torch.randperm(len(outside), generator=generator(seed, "core", name, str(d)))] for d in range(draws)]
        sets = [order[:k] for order in every if len(outside) >= k]
        random = torch.stack(sets) if sets else torch.zeros(0, k, dtype=torch.long)
        return cls(supernodes, halo, random, matched(proxy, halo, outside), mutual)

    @property
    def rows(self) -> Tensor:
        """Units whose redundancy is computed."""
        return torch.cat([self.halo, self.pairs[:, 1]]).unique()

    @property
    def columns(self) -> Tensor:
        """Units to which redundancy is computed."""
        return torch.cat([self.supernodes, self.random.flatten(), *([self.halo] if self.mutual else [])]).unique()


def matched(proxy: Tensor, halo: Tensor, outside: Tensor) -> Tensor:
    """Pairs each halo unit with the outside unit of the nearest log loss proxy, (pairs, 2) ids.

    Matching is without replacement, largest halo unit first; there are at most as many pairs as outside units.
    """
    size = proxy.clamp_min(torch.finfo(torch.float64).tiny).log()
    order = halo[size[halo].argsort(descending=True, stable=True)]
    left, pairs = outside.tolist(), []
    for unit in order.tolist():
        if not left:
            break
        near = int((size[left] - size[unit]).abs().argmin())
        pairs.append((unit, left.pop(near)))
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)


def control_rows(
    name: str, chosen: ControlSets, redundancy: Callable[[Tensor, Tensor], Tensor], connectivity: Tensor, seed: int
) -> list[dict[str, Any]]:
    """Rows of the table of controls. redundancy: function of (units, set), redundancy of units to a set; connectivity (units,)."""
    own = redundancy(chosen.halo, chosen.supernodes)
    others = torch.stack([redundancy(chosen.halo, ids).mean() for ids in chosen.random]) if len(chosen.random) else own[:0]
    rows = [{"layer": name, "control": RANDOM, "quantity": "redundancy"} | _against(own.mean(), others)]
    a, b = chosen.pairs.T.contiguous()
    values: Mapping[str, tuple[Tensor, Tensor]] = {
        "redundancy": (redundancy(a, chosen.supernodes), redundancy(b, chosen.supernodes)),
        "connectivity": (connectivity[a], connectivity[b]),
    }
    for quantity, (left, right) in values.items():
        found = _paired(left, right, name + quantity, seed)
        rows.append({"layer": name, "control": "matched non-halo", "quantity": quantity} | found)
    return rows


def _against(value: Tensor, draws: Tensor) -> dict[str, Any]:
    """A value compared with random draws: se is their standard deviation, p is one-sided and counts the value itself."""
    n = len(draws)
    mean = float(draws.mean()) if n else float("nan")
    return {
        "halo": float(value),
        "other": mean,
        "difference": float(value) - mean,
        "se": float(draws.std()) if n > 1 else float("nan"),
        "p": (1 + int((draws >= value).sum())) / (1 + n) if n else float("nan"),
        "n": n,
    }


def _paired(a: Tensor, b: Tensor, word: str, seed: int) -> dict[str, Any]:
    """The mean difference of pairs, its standard error, and a two-sided p-value from random sign flips."""
    known = a.isfinite() & b.isfinite()
    a, b = a[known].double(), b[known].double()
    d, n = a - b, int(known.sum())
    signs = torch.randint(2, (_FLIPS, n), generator=generator(seed, "flip", word)).double() * 2 - 1
    null = (signs @ d).abs() / max(n, 1)
    least = d.mean().abs() * (1 - 1e-12)  # a draw without a flip must count, despite rounding
    return {
        "halo": float(a.mean()),
        "other": float(b.mean()),
        "difference": float(d.mean()),
        "se": float(d.std() / n**0.5) if n > 1 else float("nan"),
        "p": (1 + int((null >= least).sum())) / (1 + _FLIPS) if n else float("nan"),
        "n": n,
    }


def _outside(n: int, supernodes: Tensor, halo: Tensor) -> Tensor:
    inside = torch.zeros(n, dtype=torch.bool)
    inside[supernodes], inside[halo] = True, True
    return (~inside).nonzero()[:, 0]
