"""Moments of what each unit of a layer reads: features of a Linear, patch entries of a convolution."""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..geometry import Geometry
from ..rows import Rows, SampleSums
from .moments import Moments


@dataclass(frozen=True, eq=False)
class Patches(Moments):
    """Moments of the entries a layer's units read: (channels x kernel,) in the order of the flattened weight.

    Of a convolution no patch is formed: the maps are added over samples first, then read through each kernel offset.
    Zeros that padding adds are entries like others.
    A sample with a place that is masked or not finite is left out as a whole.
    """

    by_sample: ClassVar[str | None] = None

    @classmethod
    def of(
        cls,
        x: Rows | SampleSums | Tensor,
        weights: Tensor | None = None,
        shift: Tensor | None = None,
        geometry: Geometry | None = None,
    ) -> Self:
        if geometry is None:
            return super().of(x, weights, shift)
        rows = Rows.of(x, weights, shift)  # type: ignore[arg-type]
        maps = Maps(1, rows, geometry)
        maps.add(rows)
        return cls(**maps.read([0])[0].tensors())


class Maps:
    """Sums of maps and of their squares over samples, by group: what a convolution's patches are read from, now and then.

    Sums are float32 (float64 where the rows are), to be read before they hold more than a few hundred samples a group.
    """

    def __init__(self, groups: int, like: Rows, geometry: Geometry):
        _, channels, positions = like.raw.shape
        self.sums = like.raw.new_zeros(groups, 2, channels, positions)
        self.samples = [0] * groups
        self.shift, self.grid, self.geometry = like.shift, like.grid, geometry

    def add(self, rows: Rows, group: int = 0) -> int:
        """Adds samples of one group; returns how many rows were left out as not finite.

        A sample with a place that does not count is left out whole: it spoils every patch around it.
        """
        lost = 0
        total = rows.x.sum(0)
        if rows.keep is not None or not bool(total.sum().isfinite()):
            finite = Rows(rows.raw, rows.keep, rows.shift, rows.grid, rows.moved).finite()
            lost = int(rows.n - finite.n)
            rows = Rows(rows.raw, None, rows.shift, rows.grid, rows.moved).index(finite.mask().all(1))
            total = rows.x.sum(0)
        self.sums[group, 0] += total
        if len(rows) > 2:
            self.sums[group, 1] += rows.x.square().sum(0)
        else:  # no copy of the squares
            for x in rows.x:
                self.sums[group, 1].addcmul_(x, x)
        self.samples[group] += len(rows)
        return lost

    def read(self, groups: list[int] | None = None) -> dict[int, Patches]:
        """The statistic of some groups, else of those with samples, read through every kernel offset; the sums begin anew."""
        present = groups if groups is not None else [g for g, n in enumerate(self.samples) if n]
        maps, valid = (
            self.sums[present].double().unflatten(3, self.grid),
            torch.ones((), dtype=torch.float64, device=self.sums.device),
        )
        outputs = math.prod(self.geometry.outputs(dim, size) for dim, size in enumerate(self.grid))
        for dim, size in reversed(list(enumerate(self.grid))):
            readers = self.geometry.readers(dim, size).to(maps.device)
            maps = (maps.movedim(dim + 3, -1) @ readers.T).movedim(-1, dim + 3)
            valid = readers.sum(1).reshape(-1, *[1] * valid.ndim) * valid
        outside = outputs - valid.flatten()  # entries of a sample that are padding, (kernel,)
        repeated = self.shift.repeat_interleave(len(outside))
        found = {}
        for g, (total, square) in zip(present, maps.flatten(3).unbind(), strict=True):
            n = torch.full((1,), self.samples[g] * outputs, device=maps.device)
            padding = self.samples[g] * outside * self.shift[:, None]
            found[g] = Patches(n, repeated, (total - padding).flatten(), (square + padding * self.shift[:, None]).flatten())
        self.sums.zero_()
        self.samples = [0] * len(self.samples)
        return found
