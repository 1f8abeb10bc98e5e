"""Moments of the inputs of each unit: features of a Linear layer, patch entries of a convolution."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from . import kernels
from .by_class import ByClass
from .convolution import ConvolutionGeometry
from .linalg import exact_products
from .moments import Moments
from .rows import Rows
from .sample_sums import SampleSums

LONG = 8  # positions of a row of a map from which on compiled loops are faster
SMALL = 512  # positions of a map whose sums over all kernel offsets are formed by one product


class Patches(Moments):
    """Moments of the inputs of a layer's units: (channels x kernel,) in the order of the flattened weight.

    For a convolution no patches are formed: maps are summed over samples first, then over each kernel offset.
    Padding zeros count as entries. A sample with a masked or non-finite position is left out entirely.
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
        maps = MapSums(1, rows, geometry)
        maps.add(rows, torch.zeros(len(rows), dtype=torch.int64))
        found = maps.read()
        return cls(**found[0].tensors()) if found else super().of(patch_sums(rows, geometry))


class PatchesByClass(ByClass):
    """Moments of the inputs of a layer's units, in each class of samples."""

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
        return super().of(rows if geometry is None or isinstance(rows, SampleSums) else patch_sums(rows, geometry), target)


class MapSums:
    """Sums of feature maps and of their squares over samples, per group, from which patch moments are computed now and then.

    Sums are float32 (float64 if the rows are), so call ``read`` before a group holds more than a few hundred samples.
    """

    def __init__(self, groups: int, like: Rows, geometry: ConvolutionGeometry):
        _, channels, positions = like.raw.shape
        self.sums = like.raw.new_zeros(2, groups, channels * positions)
        self.samples = [0] * groups
        self.shift, self.grid, self.geometry = like.shift, like.grid, geometry

    def add(self, rows: Rows, group: Tensor) -> Tensor:
        """Adds samples, group (samples,) int64; returns how many rows of each were dropped because they are not finite.

        A sample with a masked or non-finite position is left out entirely, because every patch around it is affected.
        """
        dropped = torch.zeros(len(rows), dtype=torch.int64)
        if rows.keep is not None or not bool(rows.sample_sums.sum().isfinite()):
            complete = _complete_samples(rows).mask()[:, 0]
            dropped = (rows.counts - rows.finite().counts)[:, 0]
            rows = Rows(rows.raw, None, rows.shift, rows.grid, rows.shifted).index(complete)
            group = group[complete.to(group.device)]
        if compiled := kernels.compiled_for(rows.raw):
            compiled.add_maps(self.sums, rows.raw, rows.shift if rows.shifted else None, group)
        else:
            _add_by_group(self.sums[0], rows.x, group)
            _add_by_group(self.sums[1], rows.x.square(), group)
        for g, count in enumerate(torch.bincount(group, minlength=len(self.samples)).tolist()):
            self.samples[g] += count
        return dropped

    def read(self) -> dict[int, Patches]:
        """The patch moments of each group that has samples; resets the sums to zero."""
        present = [g for g, n in enumerate(self.samples) if n]
        if not present:
            return {}
        maps = self.sums[:, present].double().unflatten(2, (len(self.shift), -1)).flatten(0, 1)
        sums, squares = _offset_sums(maps, self.grid, self.geometry).chunk(2)
        outputs, outside = _outputs_and_padding(self.grid, self.geometry)
        counts = torch.tensor([[self.samples[g] * outputs] for g in present], device=maps.device)
        samples = torch.tensor([[self.samples[g]] for g in present], device=maps.device)
        shift = self.shift.repeat_interleave(len(outside))
        padding = samples * outside.repeat(len(self.shift)).to(shift) * shift
        every = zip(present, counts, sums - padding, squares + padding * shift, strict=True)
        found = {g: Patches(n, shift, total, square) for g, n, total, square in every}
        self.sums.zero_()
        self.samples = [0] * len(self.samples)
        return found

    def state_dict(self) -> dict[str, Any]:
        """The sums so far as plain values."""
        return {"sums": self.sums, "samples": list(self.samples), "shift": self.shift, "grid": tuple(self.grid)}

    @classmethod
    def of_state(cls, state: Mapping[str, Any], geometry: ConvolutionGeometry) -> Self:
        """The sums whose ``state_dict`` this is."""
        maps = cls.__new__(cls)
        maps.sums, maps.samples, maps.shift, maps.grid = (state[name] for name in ("sums", "samples", "shift", "grid"))
        maps.geometry = geometry
        return maps


def patch_sums(rows: Rows, geometry: ConvolutionGeometry) -> SampleSums:
    """Per-sample sums and squares of the patch entries that a convolution reads, (samples, channels x kernel).

    A sample with a masked or non-finite position is left out entirely, because every patch around it is affected.
    """
    sums, squares = _sums_and_squares(rows, geometry)
    if rows.keep is not None or not bool(sums.sum().isfinite()):
        rows = _complete_samples(rows)
        sums, squares = _sums_and_squares(rows, geometry)
    outputs, outside = _outputs_and_padding(rows.grid, geometry)
    counts = torch.full((len(rows), 1), outputs, device=sums.device)
    if rows.keep is not None:
        counts = counts * rows.keep[:, :1]
    shift = rows.shift.repeat_interleave(len(outside))
    if rows.shifted:
        padding = (counts.sign() * outside.repeat(len(rows.shift)).to(shift) * shift).to(sums.dtype)
        sums, squares = sums - padding, squares + padding * shift.to(sums.dtype)
    return SampleSums(counts, shift, sums, rows.keep is not None, squares)


def _sums_and_squares(rows: Rows, geometry: ConvolutionGeometry) -> tuple[Tensor, Tensor]:
    """Sums of maps about the shift, and of their squares, over the reads of each kernel offset, (samples, channels x kernel)."""
    compiled = kernels.compiled_for(rows.raw)
    if compiled and rows.keep is None and len(rows.grid) == 2 and rows.grid[1] >= LONG:
        every = _readers(rows.grid, geometry, rows.raw.dtype)
        return compiled.patches(rows.raw, rows.shift if rows.shifted else None, every).unbind(0)
    return tuple(_offset_sums(x, rows.grid, geometry) for x in (rows.x, rows.x.square()))  # type: ignore[return-value]


def _add_by_group(sums: Tensor, x: Tensor, group: Tensor) -> None:
    """Adds the samples of each group to its sum, (groups, channels x positions), in place."""
    if x.device.type == "cpu":
        sums.index_add_(0, group, x.flatten(1))
        return
    weights = torch.nn.functional.one_hot(group.to(x.device), len(sums)).to(x)  # index_add_ of a GPU adds in a random order
    with exact_products():
        sums += weights.T @ x.flatten(1)


def _complete_samples(rows: Rows) -> Rows:
    complete = rows.finite().mask().all(1)
    return Rows(rows.raw, complete[:, None].expand(-1, rows.raw.shape[2]), rows.shift, rows.grid, rows.shifted)


def _outputs_and_padding(grid: tuple[int, ...], geometry: ConvolutionGeometry) -> tuple[int, Tensor]:
    """Number of output positions, and how many of them read padding through each kernel offset, (kernel,) float64.

    About the shift, a padding zero has the value -shift.
    """
    outputs = math.prod(geometry.outputs(dim, size) for dim, size in enumerate(grid))
    inside = torch.ones((), dtype=torch.float64)
    for readers in _readers(grid, geometry, torch.float64):
        inside = inside[..., None] * readers.sum(1)
    return outputs, outputs - inside.flatten()


def _offset_sums(x: Tensor, grid: tuple[int, ...], geometry: ConvolutionGeometry) -> Tensor:
    """Sums of maps (samples, channels, positions) over the reads of each kernel offset, (samples, channels x kernel)."""
    samples, channels, positions = x.shape
    entries, every = math.prod(geometry.kernel), _readers(grid, geometry, x.dtype)
    maps = x.reshape(samples * channels, *grid)
    if positions <= SMALL:  # all offsets at once
        kernel = every[0]
        for readers in every[1:]:
            kernel = (kernel[:, None, :, None] * readers[:, None]).flatten(2).flatten(0, 1)
        sums = kernel.to(x.device) @ maps.reshape(-1, positions).T
        return sums.T.reshape(samples, channels * entries)
    for dim, readers in reversed(list(enumerate(every))):
        rest = math.prod(maps.shape[:-1])
        sums = readers.to(x.device) @ maps.reshape(rest, grid[dim]).T  # few rows first: 2.5 times faster than the transpose
        maps = sums.reshape(len(readers), *maps.shape[:-1])
    return maps.reshape(entries, samples * channels).T.reshape(samples, channels * entries)


def _readers(grid: tuple[int, ...], geometry: ConvolutionGeometry, dtype: torch.dtype) -> list[Tensor]:
    return [geometry.readers(dim, size).to(dtype) for dim, size in enumerate(grid)]
