"""Criteria of whole maps: their ranks, and how much each adds to the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from nodelens.network.groups import GroupSlice, PruningGroup
from nodelens.statistics.processes import reduce_tensor
from nodelens.statistics.rows import Rows

from .base import Baseline, Found
from .passes import Need, Sums

BUDGET = 1 << 24  # numbers of the matrices that are decomposed at once, 128 MB
_IMAGES = (nn.Conv2d, nn.ConvTranspose2d)


class MapSums(Sums):
    """A number a unit and sample, of the maps that the group's first two-dimensional convolution reads, summed over samples.

    totals {group: (units,)}, and the samples. Raises ValueError where no such convolution reads the group, or the maps are one
    pixel high or wide.
    """

    reads: ClassVar = True
    name: ClassVar = "maps"

    def __init__(self, model: nn.Module, groups: Sequence[PruningGroup]):
        super().__init__(model, groups)
        self.slices = {group.name: self._first(group) for group in groups}
        self.paths = list(dict.fromkeys(piece.module for piece in self.slices.values()))
        self.totals = {group.name: self.zeros(group.n) for group in groups}
        self.counts = {group.name: self.zeros(1) for group in groups}

    def _first(self, group: PruningGroup) -> GroupSlice:
        slices = group.by_role("consumer")
        for piece in slices:
            if isinstance(self.model.get_submodule(piece.module), _IMAGES):
                return piece
        kinds = ", ".join(f"{c.module or 'the model'} ({type(self.model.get_submodule(c.module)).__name__})" for c in slices)
        raise ValueError(
            f"{self.name} wants maps: group {group.name!r} is read by {kinds}, by no two-dimensional convolution; leave it out "
            "with freeze="
        )

    def see(self, path: str, rows: Rows) -> None:
        for name, piece in self.slices.items():
            if piece.module == path:
                if len(rows.grid) != 2 or min(rows.grid) < 2:
                    raise ValueError(
                        f"{self.name} wants maps: those of group {name!r} are {' x '.join(map(str, rows.grid)) or 'single numbers'}"
                    )
                maps = rows.x[:, piece.places.to(rows.raw.device)].unflatten(3, rows.grid)
                for part in maps.split(max(1, BUDGET // maps[0].numel())):
                    self.totals[name] += self.of(part).sum(0)
                self.counts[name] += len(maps)

    def reduce(self) -> None:
        super().reduce()
        self.counts = {name: reduce_tensor(count) for name, count in self.counts.items()}

    def of(self, maps: Tensor) -> Tensor:
        """The number a sample and unit, (samples, units) float64, of maps (samples, units, places, H, W)."""
        raise NotImplementedError

    def mean(self, group: PruningGroup) -> Tensor:
        """The number a unit, over samples."""
        return (self.totals[group.name] / self.counts[group.name]).cpu()


class RankSums(MapSums):
    """Ranks of maps, over a unit's places their mean."""

    name: ClassVar = "hrank"

    def of(self, maps: Tensor) -> Tensor:
        tolerance = max(maps.shape[-2:]) * torch.finfo(maps.dtype).eps  # a float32 map has rounding that float64 would call rank
        return torch.linalg.matrix_rank(maps.double(), rtol=tolerance).double().mean(2)


class NuclearSums(MapSums):
    """What the nuclear norm of all units' maps loses without each."""

    name: ClassVar = "chip"

    def of(self, maps: Tensor) -> Tensor:
        a = maps.double().flatten(3)  # (samples, units, places, pixels)
        _, units, places, pixels = a.shape
        side = min(units * places, pixels)
        each = max(1, min(units, BUDGET // side**2))
        together = max(1, BUDGET // (each * side**2))
        return torch.cat([_lost(part, each) for part in a.split(together)])


def _lost(a: Tensor, step: int) -> Tensor:
    """||A||_* less ||A with a unit's rows zeroed||_*, (samples, units), of (samples, units, places, pixels), some units at once."""
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


@dataclass(frozen=True)
class HRank(Baseline):
    """Mean rank of a unit's maps: what maps of low rank say can be said by few rows and columns.

    Maps are read at full resolution where the unit is consumed, after its activation; all data count (the paper takes a few
    hundred images).

    Formula: E_n rank(x_u), x_u the H x W map; a singular value counts above max(H, W) eps s_max, eps the maps' own precision
    Shapes: x (samples, units, H, W) of what the first convolution reads -> (units,)
    Unit:   none, in [0, min(H, W)]
    NaN:    never
    Raises: ValueError where no two-dimensional convolution reads the group, or maps are one pixel high or wide
    Source: Lin et al. 2020, 2002.10179, eq. 5
    """

    names: ClassVar = ("hrank",)
    needs: ClassVar = "maps"

    def sums(self) -> tuple[Need, ...]:
        return (Need(RankSums),)

    def __call__(self, group: PruningGroup, found: Found) -> Tensor:
        return found.sums[Need(RankSums)].mean(group)


@dataclass(frozen=True)
class Chip(Baseline):
    """Channel independence: what the nuclear norm of all maps loses without the unit's.

    Maps are read as in ``hrank``; all data count.

    Formula: E_n (||A||_* - ||A with row u zeroed||_*), A (units, H W) the sample's maps; norms from eigenvalues of A'A or AA'
    Shapes: x (samples, units, H, W) of what the first convolution reads -> (units,)
    Unit:   that of x, >= 0
    NaN:    never
    Raises: ValueError where no two-dimensional convolution reads the group, or maps are one pixel high or wide
    Source: Sui et al. 2021, 2110.13981, eq. 4
    """

    names: ClassVar = ("chip",)
    needs: ClassVar = "maps"

    def sums(self) -> tuple[Need, ...]:
        return (Need(NuclearSums),)

    def __call__(self, group: PruningGroup, found: Found) -> Tensor:
        return found.sums[Need(NuclearSums)].mean(group)


BASELINES: tuple[type[Baseline], ...] = (HRank, Chip)
