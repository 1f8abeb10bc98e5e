"""Sums over the positions of each sample."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SampleSums:
    """Sums over the positions of each sample, from which all statistics without products of units are computed.

    Shapes: counts (samples, 1) int64, rows that count; shift (width,); each sum (samples, width) or None
    """

    counts: Tensor
    shift: Tensor
    sums: Tensor
    masked: bool = False
    squares: Tensor | None = None
    absolutes: Tensor | None = None
    nonzeros: Tensor | None = None
    cubes: Tensor | None = None
    fourths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.counts)

    def tables(self) -> dict[str, Tensor]:
        """All fields with one row per sample, by name; the inverse of ``of_tables``."""
        names = ("counts", "sums", "squares", "absolutes", "nonzeros", "cubes", "fourths")
        found = {name: getattr(self, name) for name in names}
        return {name: table for name, table in found.items() if table is not None}

    @classmethod
    def of_tables(cls, tables: dict[str, Tensor], shift: Tensor, masked: bool = True) -> "SampleSums":
        """Sums about a shift from the result of ``tables``."""
        return cls(shift=shift, masked=masked, **tables)

    def map(self, change: Callable[[Tensor], Tensor]) -> "SampleSums":
        """The same with a function applied to each table."""
        return self.of_tables({k: change(t) for k, t in self.tables().items()}, self.shift, self.masked)

    @property
    def n(self) -> Tensor:
        return self.counts.sum().reshape(1)

    @property
    def total(self) -> Tensor:
        return self.sums.sum(0, dtype=torch.float64)

    @property
    def square(self) -> Tensor:
        return _known(self.squares).sum(0, dtype=torch.float64)

    @property
    def cube(self) -> Tensor:
        return _known(self.cubes).sum(0, dtype=torch.float64)

    @property
    def fourth(self) -> Tensor:
        return _known(self.fourths).sum(0, dtype=torch.float64)

    @property
    def absolute(self) -> Tensor:
        return _known(self.absolutes).sum(0, dtype=torch.float64)

    @property
    def nonzero(self) -> Tensor:
        return _known(self.nonzeros).sum(0, dtype=torch.float64).round().long()


class SampleParts:
    """The sums of the samples of a batch, part by part, in tables that are allocated once.

    Small tensors that stay after each part would lie between large ones that are freed, whose memory could not be used again.
    """

    def __init__(self, samples: int):
        self.samples, self.filled, self.masked = samples, 0, False
        self.tables: dict[str, Tensor] = {}
        self.shift: Tensor | None = None

    def append(self, part: SampleSums) -> None:
        """Adds the sums of the next samples, about the shift of the first part."""
        tables, end = part.tables(), self.filled + len(part)
        if self.shift is None:
            self.shift = part.shift
            self.tables = {name: table.new_empty(self.samples, *table.shape[1:]) for name, table in tables.items()}
        for name, table in tables.items():
            self.tables[name][self.filled : end] = table
        self.filled, self.masked = end, self.masked or part.masked

    def joined(self) -> SampleSums | None:
        """The sums of all samples; None without a part."""
        return None if self.shift is None else SampleSums.of_tables(self.tables, self.shift, self.masked)


def _known(table: Tensor | None) -> Tensor:
    if table is None:
        raise ValueError("these per-sample sums were not computed: name them in by_sample()")
    return table
