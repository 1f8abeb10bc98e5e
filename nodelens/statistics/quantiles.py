"""Quantiles of absolute values, from histogram counts that can be added."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .base import Statistic, derived
from .bins import BINS, DROPPED, LOW, OCTAVE
from .reductions import Bins
from .rows import Rows


@dataclass(frozen=True, eq=False)
class Quantiles(Statistic):
    """Histogram of |x| of each unit, with bins from 1e-8 to 1e8, each 0.8 to 1.6 % wide, and the largest |x|.

    There are thousands of bins for each unit and group of samples. On a CPU only those between the smallest and the largest value
    are held, in the smallest whole numbers that the counts fit in.
    """

    maxima: ClassVar[tuple[str, ...]] = ("largest", "first")
    by_row: ClassVar = ("largest",)
    n: Tensor  # (1,)  int64    rows
    first: Tensor  # (1,)  int64    the bin of the second column of counts; equal in statistics of equal columns that are added
    counts: Tensor  # (d, columns)  int16, int32 or int64  rows below 1e-8, then those in each bin from ``first`` on
    largest: Tensor  # (d,)  float64  0 without rows

    @classmethod
    def of(cls, x: Rows | Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        rows = Rows.of(x, weights, shift)
        bins, (first, end) = _bins(rows)
        counts = torch.zeros(rows.raw.shape[1], 1 + end - first, dtype=torch.int64, device=rows.raw.device)
        bins.add_to(counts, first)
        return cls(rows.n, rows.n.new_tensor([first]), counts.to(_holding(_most(counts))), rows.largest)

    def __add__(self, other: Self) -> Self:
        ranges = [each for each in (self._range, other._range) if each[0] < each[1]] or [self._range]
        first, end = min(first for first, _ in ranges), max(end for _, end in ranges)
        dtype = _holding(_most(self.counts) + _most(other.counts))
        return Statistic.__add__(self._widened(first, end, dtype), other._widened(first, end, dtype))

    def add_in_place(self, other: Self) -> bool:
        alike = self.counts.device.type != "cpu" or self._range == other._range
        return alike and self._fits(_most(other.counts)) and super().add_in_place(other)

    def add_rows_in_place(self, rows: Any, *target: Tensor) -> bool:
        bins, (first, end) = _bins(rows)
        within = self._range[0] <= first and end <= self._range[1]
        if not (within and self._fits(len(rows) * rows.raw.shape[2])):
            return False
        bins.add_to(self.counts, self._range[0])
        self.n.add_(rows.n)
        torch.maximum(self.largest, rows.largest, out=self.largest)
        return True

    def widest(self) -> Self:
        return self._widened(1, BINS, torch.int64)

    @cached_property
    def _range(self) -> tuple[int, int]:
        """The bins that are held, besides that of the smallest values: first and end."""
        first = max(1, int(self.first)) if self.counts.device.type == "cpu" else 1  # on a GPU reading it would synchronise
        return first, first + self.counts.shape[1] - 1

    def _widened(self, first: int, end: int, dtype: torch.dtype) -> Self:
        """The same counts, of a larger range of bins."""
        counts, before = self.counts.new_zeros(len(self.counts), 1 + end - first, dtype=dtype), self._range[0] - first
        counts[:, 0] = self.counts[:, 0]
        counts[:, 1 + before : before + self.counts.shape[1]] = self.counts[:, 1:]
        return replace(self, first=self.first.new_tensor([first]), counts=counts)

    def _fits(self, more: int) -> bool:
        """Whether counts still fit when the largest of them grows so much; then it may."""
        limit = torch.iinfo(self.counts.dtype).max
        if self.counts.dtype == torch.int64:
            return True
        bound = self.__dict__.get("_bound")  # of the counts: they are read only when it is reached
        if bound is None or bound + more > limit:
            bound = _most(self.counts)
        self.__dict__["_bound"] = bound + more if bound + more <= limit else bound
        return bound + more <= limit

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
        """How many rows lie in a bin or below it, (d, columns) int32 or int64."""
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
        last = self.counts.shape[1] - 1
        neighbours = self.counts.gather(1, torch.cat([bins - 1, bins + 1], 1).clamp(min(1, last), last)).double().mean(1)
        along = (rank + 0.5 - (end - count)) / count - 0.5
        edges = _edges(self.counts.device)
        place = bins[:, 0] + (self._range[0] - 1) * (bins[:, 0] > 0)
        low, high = edges[place], edges[place + 1]
        value = (low + high) / 2 + along * (neighbours / count).clamp_max(1) * (high - low)
        return value.where(bins[:, 0] > 0, 0).minimum(self.largest)


def _bins(rows: Rows) -> tuple[Bins, tuple[int, int]]:
    """The bins of the values, and the range that holds them, first and end: whole factors of two.

    A bin beside each filled one is in the range, for interpolation. On a GPU, where reading it would synchronise, all bins are.
    """
    bins = Bins(rows.raw, rows.keep)
    if rows.raw.device.type != "cpu":
        return bins, (1, BINS)
    low, high = bins.filled()
    if not high:
        return bins, (1, 1)
    return bins, (max(1, (low - 1) // OCTAVE * OCTAVE), min(BINS, ((high + 1) // OCTAVE + 1) * OCTAVE))


def _most(counts: Tensor) -> int:
    """The largest count; that of an int64 on a GPU, where reading it would synchronise."""
    if counts.device.type != "cpu":
        return torch.iinfo(torch.int64).max
    return int(counts.max()) if counts.numel() else 0


def _holding(most: int) -> torch.dtype:
    """The smallest dtype of counts up to a number."""
    return next((dtype for dtype in (torch.int16, torch.int32) if most <= torch.iinfo(dtype).max), torch.int64)


def _edges(device: torch.device) -> Tensor:
    """The edges of the bins, (BINS + 1,) float64."""
    bits = torch.arange(LOW, LOW + BINS, dtype=torch.int32, device=device) << DROPPED
    edges = bits.view(torch.float32).double()
    return torch.cat([torch.zeros_like(edges[:1]), edges])
