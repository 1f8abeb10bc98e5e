"""Moments of what each unit of a layer reads: features of a Linear, patch entries of a convolution."""

import math
from typing import ClassVar, Self

import torch
from torch import Tensor

from .by_class import ByClass
from .convolution import ConvolutionGeometry
from .linalg import exact_products
from .moments import Moments
from .rows import Rows, SampleSums

SMALL = 1 << 16  # bytes of a sample below which a copy costs less than a loop


class Patches(Moments):
    """Moments of the entries a layer's units read: (channels x kernel,) in the order of the flattened weight.

    Of a convolution no patch is formed: maps are added over samples first, then read through each kernel offset.
    Zeros that padding adds are entries like others.
    A sample with a place that is masked or not finite is left out as a whole.
    """

    entries: ClassVar = True

    @classmethod
    def of(
        cls,
        x: Rows | SampleSums | Tensor,
        weights: Tensor | None = None,
        shift: Tensor | None = None,
        geometry: ConvolutionGeometry | None = None,
    ) -> Self:
        rows = x if isinstance(x, SampleSums) else Rows.of(x, weights, shift)
        if geometry is None or isinstance(rows, SampleSums):
            return super().of(rows)
        maps = Maps(1, rows, geometry)
        maps.add(rows)
        found = maps.read()
        return cls(**found[0].tensors()) if found else super().of(read(rows, geometry))


class PatchesByClass(ByClass):
    """Moments of the entries a layer's units read, in each class of samples."""

    entries: ClassVar = True

    @classmethod
    def of(
        cls,
        x: Rows | SampleSums | Tensor,
        target: Tensor,
        weights: Tensor | None = None,
        shift: Tensor | None = None,
        geometry: ConvolutionGeometry | None = None,
    ) -> Self:
        rows = x if isinstance(x, SampleSums) else Rows.of(x, weights, shift)
        return super().of(rows if geometry is None or isinstance(rows, SampleSums) else read(rows, geometry), target)


class Maps:
    """Sums of maps and of their squares over samples, by group: what a convolution's patches are read from, now and then.

    Sums are float32 (float64 where the rows are), to be read before they hold more than a few hundred samples a group.
    """

    def __init__(self, groups: int, like: Rows, geometry: ConvolutionGeometry):
        _, channels, positions = like.raw.shape
        self.sums = like.raw.new_zeros(2, groups, channels * positions)
        self.samples = [0] * groups
        self.shift, self.grid, self.geometry = like.shift, like.grid, geometry

    def add(self, rows: Rows, group: int = 0) -> int:
        """Adds samples of one group; returns how many rows were left out as not finite.

        A sample with a place that does not count is left out whole: it spoils every patch around it.
        """
        lost = 0
        total = _over_samples(rows.x)
        if rows.keep is not None or not bool(total.sum().isfinite()):
            whole = _without_spoiled(rows)
            lost = int(rows.n - rows.finite().n)
            rows = Rows(rows.raw, None, rows.shift, rows.grid, rows.moved).index(whole.mask()[:, 0])
            total = _over_samples(rows.x)
        self.sums[0, group] += total
        if rows.x[:1].nbytes < SMALL:
            self.sums[1, group] += rows.x.square().sum(0).flatten()
        else:  # no copy of the squares
            for x in rows.x:
                self.sums[1, group].view(x.shape).addcmul_(x, x)
        self.samples[group] += len(rows)
        return lost

    def read(self) -> dict[int, Patches]:
        """The statistic of each group with samples, read through every kernel offset; the sums begin anew."""
        present = [g for g, n in enumerate(self.samples) if n]
        if not present:
            return {}
        maps = self.sums[:, present].double().unflatten(2, (len(self.shift), -1)).flatten(0, 1)
        sums, squares = _through(maps, self.grid, self.geometry).chunk(2)
        outputs, outside = _places(self.grid, self.geometry)
        counts = torch.tensor([[self.samples[g] * outputs] for g in present], device=maps.device)
        samples = torch.tensor([[self.samples[g]] for g in present], device=maps.device)
        shift = self.shift.repeat_interleave(len(outside))
        padding = samples * outside.repeat(len(self.shift)).to(shift) * shift
        every = zip(present, counts, sums - padding, squares + padding * shift, strict=True)
        found = {g: Patches(n, shift, total, square) for g, n, total, square in every}
        self.sums.zero_()
        self.samples = [0] * len(self.samples)
        return found


def read(rows: Rows, geometry: ConvolutionGeometry) -> SampleSums:
    """What a convolution reads of each sample, added up: sums and squares of its entries, (samples, channels x kernel).

    A sample with a place that does not count is left out whole: it spoils every patch around it.
    """
    sums = _through(rows.x, rows.grid, geometry)
    if rows.keep is not None or not bool(sums.sum().isfinite()):
        rows = _without_spoiled(rows)
        sums = _through(rows.x, rows.grid, geometry)
    squares = _through(rows.x.square(), rows.grid, geometry)
    outputs, outside = _places(rows.grid, geometry)
    counts = torch.full((len(rows), 1), outputs, device=sums.device)
    if rows.keep is not None:
        counts = counts * rows.keep[:, :1]
    shift = rows.shift.repeat_interleave(len(outside))
    if rows.moved:
        padding = (counts.sign() * outside.repeat(len(rows.shift)).to(shift) * shift).to(sums.dtype)
        sums, squares = sums - padding, squares + padding * shift.to(sums.dtype)
    return SampleSums(counts, shift, sums, rows.keep is not None, squares)


def _over_samples(x: Tensor) -> Tensor:
    """Sum over samples, (channels x positions,): as a product, which reads the rows fastest."""
    with exact_products():
        return x.new_ones(1, len(x)).mm(x.flatten(1))[0]


def _without_spoiled(rows: Rows) -> Rows:
    whole = rows.finite().mask().all(1)
    return Rows(rows.raw, whole[:, None].expand(-1, rows.raw.shape[2]), rows.shift, rows.grid, rows.moved)


def _places(grid: tuple[int, ...], geometry: ConvolutionGeometry) -> tuple[int, Tensor]:
    """Places of the output, and how many of them read padding through each kernel offset, (kernel,) float64.

    A zero of the padding lies at minus the shift.
    """
    outputs = math.prod(geometry.outputs(dim, size) for dim, size in enumerate(grid))
    inside = torch.ones((), dtype=torch.float64)
    for readers in _readers(grid, geometry, torch.float64):
        inside = inside[..., None] * readers.sum(1)
    return outputs, outputs - inside.flatten()


def _through(x: Tensor, grid: tuple[int, ...], geometry: ConvolutionGeometry) -> Tensor:
    """Sums of maps (samples, channels, positions) through each kernel offset, (samples, channels x kernel)."""
    samples, channels = x.shape[:2]
    maps = x.reshape(samples * channels, *grid)
    for dim, readers in reversed(list(enumerate(_readers(grid, geometry, x.dtype)))):
        maps = (maps.movedim(dim + 1, -1) @ readers.T.to(x.device)).movedim(-1, dim + 1)
    return maps.reshape(samples, channels * math.prod(geometry.kernel))


def _readers(grid: tuple[int, ...], geometry: ConvolutionGeometry, dtype: torch.dtype) -> list[Tensor]:
    return [geometry.readers(dim, size).to(dtype) for dim, size in enumerate(grid)]
