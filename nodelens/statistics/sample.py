"""A sample of rows that does not depend on how they came."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from .base import Statistic
from .rows import Rows
from .sample_hash import mix

ROWS = 2048  # that are kept


@dataclass(frozen=True, eq=False)
class Sample(Statistic):
    """The rows with the smallest keys, at most ROWS of them: the same whatever the batches, their order and the processes."""

    keyed: ClassVar = True
    merged: ClassVar = True
    keys: Tensor  # (r,)    int64    ascending
    rows: Tensor  # (r, d)  float64  not about a shift
    beside: Tensor  # (r, t)  float64  what stands beside them; t = 0 for nothing
    seen: Tensor  # (1,)    int64    rows they were taken from

    @classmethod
    def of(
        cls,
        x: Rows | Tensor,
        target: Tensor | None = None,
        weights: Tensor | None = None,
        shift: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Self:
        """Rows with a key a sample, (samples,) int64, and a target (samples,) or (samples, t), or none.

        Of a sample with several positions each has a key of its own, and the sample's target. A row that is not finite, or
        whose target is not, is left out. Raises ValueError where keys are missing or the numbers differ.
        """
        rows = Rows.of(x, weights, shift)
        samples, _, positions = rows.raw.shape
        z = rows.raw.new_zeros(samples, 0) if target is None else target[:, None] if target.ndim == 1 else target
        if keys is None or len(keys) != samples or len(z) != samples:
            raise ValueError(
                f"{samples} samples meet {'no' if keys is None else len(keys)} keys and {len(z)} targets: a sample of rows "
                "wants one key, and one target, a sample"
            )
        keys, z = keys.to(rows.raw.device), z.to(rows.raw.device)
        if positions > 1:
            keys = mix(keys[:, None], torch.arange(positions, device=keys.device))
        keep = (rows.mask() & rows.raw.isfinite().all(1) & z.isfinite().all(1)[:, None]).flatten()
        keys = keys.flatten()[keep]
        first = torch.argsort(keys, stable=True)[:ROWS]
        place = keep.nonzero()[first, 0]
        chosen = rows.raw[place // positions, :, place % positions].double()
        return cls(keys[first], chosen, z[place // positions].to(chosen), keep.sum().reshape(1))

    def __add__(self, other: Self) -> Self:
        mine, theirs = self.tensors(), other.tensors()
        both = {k: torch.cat([mine[k], theirs[k]]) for k in ("keys", "rows", "beside")}
        first = torch.argsort(both["keys"], stable=True)[:ROWS]
        return type(self)(**{k: t[first] for k, t in both.items()}, seen=self.seen + other.seen)

    def take_in(self, other: Self) -> bool:
        """Never: which rows are held changes with those that come."""
        return False
