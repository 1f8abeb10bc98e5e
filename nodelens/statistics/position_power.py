"""Squares of each unit at each position of a sample."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from .base import Statistic
from .reductions import magnitude
from .rows import Rows


@dataclass(frozen=True, eq=False)
class PositionPower(Statistic):
    """Sums over samples of the square of each unit, at each position.

    A position is the number of valid tokens before it, so that padding on either side moves none. Parts of other lengths add:
    the shorter one has no rows at the last positions.
    """

    merged: ClassVar[bool] = True
    n: Tensor  # (T,)    int64    samples with a row at the position
    power: Tensor  # (d, T)  float64  sum of x^2

    @classmethod
    def of(cls, x: Rows) -> Self:
        keep = x.mask()
        place = (keep.cumsum(1) - 1).clamp_min(0)  # (samples, positions)
        power = magnitude(x.raw, x.keep).double().square()
        moved = torch.zeros_like(power).scatter_add_(2, place[:, None].expand_as(power), power).sum(0)
        count = torch.zeros_like(place).scatter_add_(1, place, keep.long()).sum(0)
        return cls(count, moved)

    def __add__(self, other: Self) -> Self:
        length = max(len(self.n), len(other.n))
        mine, theirs = (
            {name: nn.functional.pad(t, (0, length - t.shape[-1])) for name, t in part.tensors().items()} for part in (self, other)
        )
        return type(self)(**{name: t + theirs[name] for name, t in mine.items()})
