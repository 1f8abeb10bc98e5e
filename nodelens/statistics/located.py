"""Sums of each unit at each position of a map."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from .base import Statistic
from .rows import Rows


@dataclass(frozen=True, eq=False)
class Located(Statistic):
    """Number of samples with a row at each position, and their sum there, about a shift. All maps have the same size."""

    shifts: ClassVar[tuple[str, ...]] = ("shift",)
    n: Tensor  # (P,)    int64
    shift: Tensor  # (d,)    float64
    total: Tensor  # (d, P)  float64  sum of x - shift

    @classmethod
    def of(cls, x: Rows | Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        rows = Rows.of(x, weights, shift)
        return cls(rows.mask().sum(0), rows.shift, rows.x.sum(0, dtype=torch.float64))

    def about(self, shift: Tensor) -> Self:
        return type(self)(self.n, shift, self.total + (self.shift - shift)[:, None] * self.n)

    def __add__(self, other: Self) -> Self:
        if len(self.n) != len(other.n):
            raise ValueError(f"maps have {len(self.n)} and {len(other.n)} positions: spatial=per_location needs maps of one size")
        return super().__add__(other)

    @property
    def mean(self) -> Tensor:
        """(d, P), in the unit of x; NaN at a position without rows."""
        return self.shift[:, None] + self.total / self.n

    @property
    def outer(self) -> Tensor:
        """Sum over positions of n m m', m the mean at a position about the shift, (d, d)."""
        return (self.total / self.n.clamp_min(1)) @ self.total.T
