"""Quantiles of absolute values, from histogram counts that can be added."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .base import Statistic, derived
from .bins import BINS, DROPPED, LOW
from .reductions import add_bins
from .rows import Rows


@dataclass(frozen=True, eq=False)
class Quantiles(Statistic):
    """Histogram of |x| of each unit, with bins from 1e-8 to 1e8, each 0.8 to 1.6 % wide, and the largest |x|.

    On a CPU counts are held in the smallest whole numbers that the number of rows fits in: most bins are empty, and there are
    thousands of them for each unit and group of samples.
    """

    maxima: ClassVar[tuple[str, ...]] = ("largest",)
    by_row: ClassVar = ("largest",)
    n: Tensor  # (1,)      int64    rows
    counts: Tensor  # (d, BINS) int16, int32 or int64, rows whose |x| lies in the bin
    largest: Tensor  # (d,)      float64  0 without rows

    @classmethod
    def of(cls, x: Rows | Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        rows = Rows.of(x, weights, shift)
        samples, width, positions = rows.raw.shape
        counts = torch.zeros(width, BINS, dtype=_holding(samples * positions, rows.raw), device=rows.raw.device)
        add_bins(counts, rows.raw, rows.keep)
        return cls(rows.n, counts, rows.largest)

    def __add__(self, other: Self) -> Self:
        dtype = _holding(self.n + other.n, self.counts)
        mine, theirs = (replace(each, counts=each.counts.to(dtype)) for each in (self, other))
        return Statistic.__add__(mine, theirs)

    def add_in_place(self, other: Self) -> bool:
        fits = self.counts.shape == other.counts.shape and self._fits(other.n)
        return fits and super().add_in_place(other)

    def widest(self) -> Self:
        return replace(self, counts=self.counts.long())

    def _fits(self, rows: Tensor | int) -> bool:
        """Whether counts of further rows fit."""
        most = torch.iinfo(self.counts.dtype).max
        return self.counts.dtype == torch.int64 or (self.counts.device.type == "cpu" and int(self.n + rows) <= most)

    def add_rows_in_place(self, rows: Any, *target: Tensor) -> bool:
        if not self._fits(len(rows) * rows.raw.shape[2]):
            return False
        add_bins(self.counts, rows.raw, rows.keep)
        self.n.add_(rows.n)
        torch.maximum(self.largest, rows.largest, out=self.largest)
        return True

    def quantile(self, q: float) -> Tensor:
        """The q-quantile of |x|, (d,), interpolated between order statistics, accurate to 1 %; NaN without rows.

        The largest value is exact.
        """
        n = int(self.n)
        if not n:
            return torch.full_like(self.counts[:, 0], torch.nan, dtype=torch.float64)
        place = (n - 1) * q
        first = min(int(place), n - 1)
        low, high = self._order_statistic(first), self._order_statistic(min(first + 1, n - 1))
        return low + (place - first) * (high - low)

    @property
    @derived
    def ends(self) -> Tensor:
        """How many rows lie in a bin or below it, (d, BINS) int32 or int64."""
        return self.counts.cumsum(1, dtype=torch.int64 if self.counts.dtype == torch.int64 else torch.int32)

    def _order_statistic(self, rank: int) -> Tensor:
        """The value of a rank from 0, (d,), interpolated within its bin if the neighbouring bins are filled as well.

        Otherwise the centre of the bin, so that a value which occurs many times is off by at most half a bin. The largest is exact.
        """
        if rank == int(self.n) - 1:
            return self.largest
        ends = self.ends
        bins = torch.searchsorted(ends, ends.new_full((len(ends), 1), rank), right=True)
        count, end = (t.gather(1, bins)[:, 0].double() for t in (self.counts, ends))
        neighbours = self.counts.gather(1, torch.cat([bins - 1, bins + 1], 1).clamp(1, BINS - 1)).double().mean(1)
        along = (rank + 0.5 - (end - count)) / count - 0.5
        edges = _edges(self.counts.device)
        low, high = edges[bins[:, 0]], edges[bins[:, 0] + 1]
        value = (low + high) / 2 + along * (neighbours / count).clamp_max(1) * (high - low)
        return value.where(bins[:, 0] > 0, 0).minimum(self.largest)


def _holding(rows: int | Tensor, like: Tensor) -> torch.dtype:
    """The dtype of counts of so many rows: int64 unless they are on a CPU, because a check would synchronise."""
    if like.device.type != "cpu":
        return torch.int64
    return next(dtype for dtype in (torch.int16, torch.int32, torch.int64) if int(rows) <= torch.iinfo(dtype).max)


def _edges(device: torch.device) -> Tensor:
    """The edges of the bins, (BINS + 1,) float64."""
    bits = torch.arange(LOW, LOW + BINS, dtype=torch.int32, device=device) << DROPPED
    edges = bits.view(torch.float32).double()
    return torch.cat([torch.zeros_like(edges[:1]), edges])
