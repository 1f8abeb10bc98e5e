"""Sets of units to remove together: pairs, and sets that grow in the order of a score or at random."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from nodelens.statistics.sample_hash import generator

Removed = dict[str, list[int]]


def random_pairs(table: pd.DataFrame, count: int, seed: int = 0) -> list[tuple[str, int, int]]:
    """``count`` different pairs of units of one layer, (layer, unit, unit); layers in proportion to their pairs, from the seed."""
    ids = {str(layer): rows.index.get_level_values("unit").to_numpy() for layer, rows in table.groupby(level="layer", sort=False)}
    sizes = {layer: len(units) * (len(units) - 1) // 2 for layer, units in ids.items()}
    total = sum(sizes.values())
    order = torch.randperm(total, generator=generator(seed, "pairs"))[:count].sort().values.tolist() if total <= 1 << 22 else None
    places = order if order is not None else _distinct(total, count, seed)
    found, start = list[tuple[str, int, int]](), 0
    for layer, size in sizes.items():
        inside = [place - start for place in places if start <= place < start + size]
        pairs = [[int(ids[layer][k]) for k in _pair(place)] for place in inside]
        found += [(layer, a, b) for a, b in pairs]
        start += size
    return found


def lowest_first(scores: pd.Series, share: float) -> Removed:
    """The units of each layer with the lowest scores, a share of them, rounded, at least one and fewer than all; NaN goes last."""
    found: Removed = {}
    for layer, rows in scores.groupby(level="layer", sort=False):
        order = np.argsort(rows.fillna(np.inf).to_numpy(float), kind="stable")
        units = rows.index.get_level_values("unit").to_numpy()
        found[str(layer)] = units[order[: _count(len(rows), share)]].tolist()
    return found


def at_random(table: pd.DataFrame, share: float, seed: int, draw: int) -> Removed:
    """As many units of each layer, drawn from the seed; a larger share of the same draw holds the smaller one."""
    found: Removed = {}
    for layer, rows in table.groupby(level="layer", sort=False):
        order = torch.randperm(len(rows), generator=generator(seed, "growing", str(layer), str(draw))).numpy()
        units = rows.index.get_level_values("unit").to_numpy()
        found[str(layer)] = units[order[: _count(len(rows), share)]].tolist()
    return found


def check_shares(name: str, shares: Sequence[float]) -> None:
    """Raises ValueError for a share that is not between 0 and 1."""
    wrong = [share for share in shares if not 0 < share < 1]
    if wrong:
        raise ValueError(f"{name}: shares has {wrong[0]!r}; a share of the units lies between 0 and 1, such as 0.1")


def _count(n: int, share: float) -> int:
    return min(max(1, round(share * n)), max(n - 1, 1))


def _distinct(total: int, count: int, seed: int) -> list[int]:
    """Different numbers below a large total."""
    drawn = torch.randint(total, (2 * count,), generator=generator(seed, "pairs"))
    return sorted(list(dict.fromkeys(drawn.tolist()))[:count])


def _pair(place: int) -> tuple[int, int]:
    """The pair (i, j), i < j, with the number j (j - 1) / 2 + i."""
    j = int((1 + np.sqrt(1 + 8 * place)) // 2)
    while j * (j - 1) // 2 > place:
        j -= 1
    while (j + 1) * j // 2 <= place:
        j += 1
    return place - j * (j - 1) // 2, j
