"""Quantiles of sizes, from counts that add."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .base import Statistic
from .rows import Rows

DROPPED = 17  # bits of a float32's 23 after the point that a bin does not see: 64 bins to a factor of two
LOW = 0x322BCC77 >> DROPPED  # of 1e-8
HIGH = 0x4CBEBC20 >> DROPPED  # of 1e8
BINS = HIGH - LOW + 2  # the first counts what lies below and reads 0, the last also what lies above


@dataclass(frozen=True, eq=False)
class Quantiles(Statistic):
    """How often |x| of each unit falls into bins from 1e-8 to 1e8, each 0.8 to 1.6 % wide."""

    n: Tensor  # (1,)      int64  rows
    counts: Tensor  # (d, BINS) int64  rows whose |x| lies in the bin

    @classmethod
    def of(cls, x: Rows | Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        rows = Rows.of(x, weights, shift)
        width = rows.raw.shape[1]
        counts = torch.bincount(_places(rows), minlength=width * BINS).reshape(width, BINS)
        counts[:, 0] -= rows.mask().numel() - rows.n  # rows that are not kept were counted as zeros
        return cls(rows.n, counts)

    def take_rows(self, rows: Rows) -> bool:
        """In place where there are fewer values than bins: a table of its own would cost more than the counting."""
        places = _places(rows)
        if len(places) >= self.counts.numel():
            return False
        self.counts.view(-1).scatter_add_(0, places.long(), torch.ones_like(self.n).expand(len(places)))
        self.counts[:, 0] -= rows.mask().numel() - rows.n
        self.n.add_(rows.n)
        return True

    def quantile(self, q: float) -> Tensor:
        """The q-quantile of |x|, (d,), linear between order statistics; to 1 %. NaN without rows."""
        n = int(self.n)
        if not n:
            return torch.full_like(self.counts[:, 0], torch.nan, dtype=torch.float64)
        place = (n - 1) * q
        first = min(int(place), n - 1)
        low, high = self._ordered(first), self._ordered(min(first + 1, n - 1))
        return low + (place - first) * (high - low)

    def _ordered(self, rank: int) -> Tensor:
        """The value of a rank from 0, (d,): by its rank among its bin's values, where the bins beside are filled as well.

        Else the bin's middle: one value that is there many times is read at most half a bin too high or low.
        """
        ends = self.counts.cumsum(1)
        bins = (ends <= rank).sum(1, keepdim=True)
        count, end = (t.gather(1, bins)[:, 0].double() for t in (self.counts, ends))
        beside = self.counts.gather(1, torch.cat([bins - 1, bins + 1], 1).clamp(1, BINS - 1)).double().mean(1)
        along = (rank + 0.5 - (end - count)) / count - 0.5
        edges = _edges(self.counts.device)
        low, high = edges[bins[:, 0]], edges[bins[:, 0] + 1]
        return ((low + high) / 2 + along * (beside / count).clamp_max(1) * (high - low)).where(bins[:, 0] > 0, 0)


def _places(rows: Rows) -> Tensor:
    """Where each value is counted in a table of bins by unit, int32."""
    width = rows.raw.shape[1]
    first = torch.arange(0, width * BINS, BINS, dtype=torch.int32, device=rows.raw.device)[:, None]
    return (_bin(rows.magnitude) + first).flatten()


def _bin(size: Tensor) -> Tensor:
    """The bin of |x|, int32: the leading bits of a float32 are its logarithm in steps."""
    bits = size.float().contiguous().view(torch.int32)
    return ((bits >> DROPPED) - (LOW - 1)).clamp_(0, BINS - 1)


def _edges(device: torch.device) -> Tensor:
    """Where bins begin, and the last ends, (BINS + 1,) float64."""
    bits = torch.arange(LOW, LOW + BINS, dtype=torch.int32, device=device) << DROPPED
    edges = bits.view(torch.float32).double()
    return torch.cat([torch.zeros_like(edges[:1]), edges])
