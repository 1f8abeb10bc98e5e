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

    @classmethod
    def cat(cls, parts: list["SampleSums"]) -> "SampleSums":
        """Concatenate the samples of several parts about the same shift."""
        if len(parts) == 1:
            return parts[0]
        every = [p.tables() for p in parts]
        joined = {name: torch.cat([tables[name] for tables in every]) for name in every[0]}
        return cls.of_tables(joined, parts[0].shift, any(p.masked for p in parts))

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


def _known(table: Tensor | None) -> Tensor:
    if table is None:
        raise ValueError("these per-sample sums were not computed: name them in by_sample()")
    return table
