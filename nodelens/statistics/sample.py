"""A random sample of rows that does not depend on batches, their order or the number of processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from .base import Statistic
from .rows import Rows
from .sample_hash import mix

ROWS = 2048  # largest number of rows in a sample


@dataclass(frozen=True, eq=False)
class Sample(Statistic):
    """The rows with the smallest hashes, at most ROWS of them: a bottom-k sample, the same for any split of the data."""

    takes_hashes: ClassVar = True
    merged: ClassVar = True
    hashes: Tensor  # (r,)    int64    ascending
    rows: Tensor  # (r, d)  float64  not shifted
    target: Tensor  # (r, t)  float64  paired targets; t = 0 for none
    seen: Tensor  # (1,)    int64    number of rows sampled from

    @classmethod
    def of(
        cls,
        x: Rows | Tensor,
        target: Tensor | None = None,
        weights: Tensor | None = None,
        shift: Tensor | None = None,
        hashes: Tensor | None = None,
    ) -> Self:
        """Rows with one hash per sample, (samples,) int64, and a target (samples,) or (samples, t), or none.

        Each position of a sample gets a hash of its own and the target of the sample. A row that is not finite, or whose
        target is not, is left out. Raises ValueError if hashes are missing or the numbers differ.
        """
        rows = Rows.of(x, weights, shift)
        samples, _, positions = rows.raw.shape
        z = rows.raw.new_zeros(samples, 0) if target is None else target[:, None] if target.ndim == 1 else target
        if hashes is None or len(hashes) != samples or len(z) != samples:
            raise ValueError(
                f"{samples} samples, but {'no' if hashes is None else len(hashes)} hashes and {len(z)} targets: give one hash, "
                "and at most one target row, per sample"
            )
        hashes, z = hashes.to(rows.raw.device), z.to(rows.raw.device)
        if positions > 1:
            hashes = mix(hashes[:, None], torch.arange(positions, device=hashes.device))
        keep = (rows.mask() & rows.raw.isfinite().all(1) & z.isfinite().all(1)[:, None]).flatten()
        hashes = hashes.flatten()[keep]
        first = torch.argsort(hashes, stable=True)[:ROWS]
        place = keep.nonzero()[first, 0]
        chosen = rows.raw[place // positions, :, place % positions].double()
        return cls(hashes[first], chosen, z[place // positions].to(chosen), keep.sum().reshape(1))

    def __add__(self, other: Self) -> Self:
        return self.added([self, other])

    @classmethod
    def added(cls, parts: Sequence[Self]) -> Self:
        every = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("hashes", "rows", "target")}
        first = torch.argsort(every["hashes"], stable=True)[:ROWS]
        return cls(**{name: t[first] for name, t in every.items()}, seen=torch.stack([part.seen for part in parts]).sum(0))

    def add_in_place(self, other: Self) -> bool:
        """Never in place: the rows held change with those added."""
        return False
