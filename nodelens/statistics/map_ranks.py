"""Statistics of whole feature maps: their ranks, and what each adds to the nuclear norm of all."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .base import Statistic
from .rows import Rows

BUDGET = 1 << 24  # numbers of the matrices that are decomposed at once, 128 MB


@dataclass(frozen=True, eq=False)
class MapRanks(Statistic):
    """Sum over samples of the rank of each unit's feature map, the mean over its maps where it has several.

    Rows hold (samples, units, maps x pixels) with the grid (maps, height, width).
    """

    n: Tensor  # (1,)  int64    samples
    total: Tensor  # (d,)  float64  sum of the ranks

    @classmethod
    def of(cls, x: Rows) -> Self:
        total = torch.zeros(x.raw.shape[1], dtype=torch.float64, device=x.raw.device)
        for part in _maps(x).split(max(1, BUDGET // max(1, x.raw[:1].numel()))):
            total += cls._of_maps(part).sum(0)
        return cls(torch.full((1,), len(x), device=total.device), total)

    @staticmethod
    def _of_maps(maps: Tensor) -> Tensor:
        """The number of each sample and unit, (samples, units) float64, of maps (samples, units, maps, height, width)."""
        tolerance = max(maps.shape[-2:]) * torch.finfo(maps.dtype).eps  # a float32 map has rounding that float64 would call rank
        return torch.linalg.matrix_rank(maps.double(), rtol=tolerance).double().mean(2)


@dataclass(frozen=True, eq=False)
class MapIndependence(MapRanks):
    """Sum over samples of what the nuclear norm of all units' maps loses without each unit's."""

    @staticmethod
    def _of_maps(maps: Tensor) -> Tensor:
        a = maps.double().flatten(3)  # (samples, units, maps, pixels)
        _, units, places, pixels = a.shape
        side = min(units * places, pixels)
        each = max(1, min(units, BUDGET // side**2))
        together = max(1, BUDGET // (each * side**2))
        return torch.cat([_lost(part, each) for part in a.split(together)])


def _maps(x: Rows) -> Tensor:
    """Maps as matrices, (samples, units, maps, height, width); a pixel that does not count is 0."""
    raw = x.raw if x.keep is None else x.raw.where(x.keep[:, None], 0)
    return raw.unflatten(2, x.grid)


def _lost(a: Tensor, step: int) -> Tensor:
    """||A||_* - ||A with a unit's rows zeroed||_*, (samples, units), of (samples, units, maps, pixels), some units at once."""
    rows = a.flatten(1, 2)
    wide = rows.shape[1] <= rows.shape[2]
    gram = rows @ rows.mT if wide else rows.mT @ rows
    norm, found = _nuclear(gram), []
    for first in range(0, a.shape[1], step):
        some = torch.arange(first, min(first + step, a.shape[1]), device=a.device)
        if wide:
            stays = torch.ones(len(some), *a.shape[1:3], dtype=a.dtype, device=a.device)
            stays[torch.arange(len(some), device=a.device), some] = 0
            kept = stays.flatten(1)
            without = gram[:, None] * kept[:, :, None] * kept[:, None]
        else:
            without = gram[:, None] - a[:, some].mT @ a[:, some]
        found.append(norm[:, None] - _nuclear(without))
    return torch.cat(found, 1)


def _nuclear(gram: Tensor) -> Tensor:
    """The nuclear norm of A from A'A or AA', (..., side, side) -> (...); what is below the rounding of the largest is 0."""
    values = torch.linalg.eigvalsh(gram)
    rounding = gram.shape[-1] * torch.finfo(gram.dtype).eps * values[..., -1:].abs()
    return values.where(values > rounding, 0).sqrt().sum(-1)
