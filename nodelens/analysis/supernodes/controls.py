"""Controls of the redundancy to a core: other cores of the same size, and units outside the halo that matter as much."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nodelens.statistics.sample_hash import generator

_FLIPS = 999  # of signs, for the p-value of a mean difference
COLUMNS = ("layer", "control", "quantity", "halo", "other", "difference", "se", "p", "n")


@dataclass(frozen=True)
class Compared:
    """Which units of a group are compared: ids. core (k,), halo (h,), random (draws, k), matched pairs halo -> other (pairs, 2)."""

    core: Tensor
    halo: Tensor
    random: Tensor
    pairs: Tensor

    @classmethod
    def of(cls, name: str, proxy: Tensor, core: Tensor, halo: Tensor, draws: int, seed: int) -> "Compared":
        """Random cores are drawn among the units of neither core nor halo; without enough of them there is none."""
        outside = _outside(len(proxy), core, halo)
        cores = [outside[torch.randperm(len(outside), generator=generator(seed, "core", name, str(k)))] for k in range(draws)]
        enough = [drawn[: len(core)] for drawn in cores if len(outside) >= len(core)]
        random = torch.stack(enough) if enough else torch.zeros(0, len(core), dtype=torch.long)
        return cls(core, halo, random, matched(proxy, halo, outside))

    @property
    def rows(self) -> Tensor:
        """Units whose redundancy is wanted."""
        return torch.cat([self.halo, self.pairs[:, 1]]).unique()

    @property
    def columns(self) -> Tensor:
        """Units to which."""
        return torch.cat([self.core, self.random.flatten()]).unique()


def matched(proxy: Tensor, halo: Tensor, outside: Tensor) -> Tensor:
    """Each halo unit with the unit outside that is nearest in the logarithm of the loss proxy, (pairs, 2) ids.

    Without replacement, the largest first; no more pairs than there are units outside.
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
    name: str, chosen: Compared, redundancy: Callable[[Tensor, Tensor], Tensor], connectivity: Tensor, seed: int
) -> list[dict[str, Any]]:
    """Rows of the table of controls. redundancy (units, core) -> that of units to a core, (units,); connectivity (units,)."""
    own = redundancy(chosen.halo, chosen.core)
    others = torch.stack([redundancy(chosen.halo, core).mean() for core in chosen.random]) if len(chosen.random) else own[:0]
    rows = [{"layer": name, "control": "random core", "quantity": "redundancy"} | _against(own.mean(), others)]
    a, b = chosen.pairs.T.contiguous()
    values: Mapping[str, tuple[Tensor, Tensor]] = {
        "redundancy": (redundancy(a, chosen.core), redundancy(b, chosen.core)),
        "connectivity": (connectivity[a], connectivity[b]),
    }
    for quantity, (left, right) in values.items():
        found = _paired(left, right, name + quantity, seed)
        rows.append({"layer": name, "control": "matched non-halo", "quantity": quantity} | found)
    return rows


def _against(value: Tensor, draws: Tensor) -> dict[str, Any]:
    """A value beside draws of chance: se is their spread, p one-sided with the value among them."""
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
    """The mean difference of pairs, its standard error, and a two-sided p by flips of their signs."""
    known = a.isfinite() & b.isfinite()
    a, b = a[known].double(), b[known].double()
    d, n = a - b, int(known.sum())
    signs = torch.randint(2, (_FLIPS, n), generator=generator(seed, "flip", word)).double() * 2 - 1
    null = (signs @ d).abs() / max(n, 1)
    least = d.mean().abs() * (1 - 1e-12)  # a flip of nothing is as large
    return {
        "halo": float(a.mean()),
        "other": float(b.mean()),
        "difference": float(d.mean()),
        "se": float(d.std() / n**0.5) if n > 1 else float("nan"),
        "p": (1 + int((null >= least).sum())) / (1 + _FLIPS) if n else float("nan"),
        "n": n,
    }


def _outside(n: int, core: Tensor, halo: Tensor) -> Tensor:
    inside = torch.zeros(n, dtype=torch.bool)
    inside[core], inside[halo] = True, True
    return (~inside).nonzero()[:, 0]
