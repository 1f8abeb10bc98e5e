"""Sums over the positions of each sample, and counts of sizes: one function for each, for all that a site needs of its rows."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import kernels
from .bins import BINS, DROPPED, LOW
from .linalg import FEW, exact_products, maps_by_sample

SUMS = ("sums", "squares", "cubes", "fourths", "absolutes", "nonzeros", "largest")
MANY = 512  # positions from which on compiled loops are faster whatever is wanted
_SIZES = {"absolutes", "nonzeros", "largest"}
_POWERS = {"cubes", "fourths", "norms"}
_LEADING = (1 << 31 - DROPPED) - 1  # the bits of a float32 that a bin reads, without the sign


def reduce(
    raw: Tensor,
    keep: Tensor | None = None,
    shift: Tensor | None = None,
    wanted: Collection[str] = (),
    samples: Tensor | None = None,
) -> dict[str, Tensor]:
    """What is wanted of rows, and the values that it was computed from.

    raw (samples, width, positions), float32 or float64, of any strides; keep (samples, positions) bool, None for all;
    shift (width,) float64, None for zero; samples (n,) int64: which ones, in this order, None for all

    Returns, by name:
    raw        (n, width, positions)  values as they are
    x          (n, width, positions)  values about the shift, 0 for masked rows; only where the sums are formed of them
    sums, squares, cubes, fourths  (n, width)  sums of powers about the shift
    absolutes, nonzeros, largest   (n, width)  sums of |value|, number of non-zero values, largest |value|, none of them shifted
    norms      (n, positions)         squared norms of the rows about the shift
    skews      (n, width)             sums of values about the shift times the squared norm of their row; only with ``norms``

    all in the dtype of the rows. A sum of squares of P float32 values has a relative error of at most 2^-24 (P + 3). A NaN or an
    infinity makes the sums of its unit and sample non-finite. More may be returned than is wanted.
    """
    if samples is not None:
        samples = samples.to(raw.device)
        raw, keep = _chosen(raw, samples), None if keep is None else keep[samples]
    compiled = kernels.compiled_for(raw)
    if compiled and (_POWERS & {*wanted} or raw.shape[2] >= MANY):
        return {"raw": raw} | compiled.reduce(raw, keep, shift, wanted)
    x = raw if shift is None else raw - shift.to(raw.dtype)[:, None]
    x = x if keep is None else x.where(keep[:, None], 0)
    return {"x": x, "raw": raw} | _powers(x, wanted) | (_sizes(raw, keep, wanted) if _SIZES & {*wanted} else {})


def _chosen(raw: Tensor, samples: Tensor) -> Tensor:
    """Copies of some samples. Where a unit has few positions its values are put side by side with those of the other units."""
    if raw.stride(1) == 1 or not (raw.shape[2] == 1 or maps_by_sample(raw, raw)):
        return raw.transpose(1, 2).index_select(0, samples).transpose(1, 2)
    return raw.index_select(0, samples)


def _powers(x: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
    """Sums of powers of values about the shift, each power formed once."""
    found: dict[str, Tensor] = {}
    if "sums" in wanted:
        found["sums"] = _over_positions(x)
    by_row = x.shape[2] > 1 and x.stride(1) == 1  # as in a map whose channels come last
    if "squares" in wanted and not by_row and not _POWERS & {*wanted}:
        return found | {"squares": torch.linalg.vector_norm(x, dim=2).square()}  # the only reduction of squares without a copy
    square = x.square() if {"squares", "cubes", "fourths"} & {*wanted} else x
    if "squares" in wanted:
        found["squares"] = _over_positions(square)
    if "cubes" in wanted or "fourths" in wanted:
        found["cubes"], found["fourths"] = _over_positions(square * x), _over_positions(square.square())
    if "norms" in wanted:
        if square is x and x.shape[2] > 1 and not by_row:  # across values that lie apart vector_norm takes 6 to 18 times as long
            square = x.square()
        found["norms"] = torch.linalg.vector_norm(x, dim=1).square() if square is x else square.sum(1)
        if "skews" in wanted:
            found["skews"] = _over_positions(x * found["norms"][:, None])
    return found


def _over_positions(x: Tensor) -> Tensor:
    """Sums over positions, (samples, width)."""
    samples, width, positions = x.shape
    if positions == 1:
        return x[:, :, 0]
    if x.device.type == "cpu" and 1 < positions <= FEW and x.is_contiguous():  # a sum over few numbers is slow
        with exact_products():
            return (x.new_ones(1, positions) @ x.view(-1, positions).T).view(samples, width)
    return x.sum(2)


@dataclass(frozen=True, eq=False)
class Bins:
    """The bin of each |value| of rows, 0 for masked rows. raw (samples, width, positions), keep (samples, positions) or None."""

    raw: Tensor
    keep: Tensor | None = None

    def filled(self) -> tuple[int, int]:
        """The smallest bin above 0 that holds a value, ``BINS`` if there is none, and the largest one. It synchronises a GPU."""
        if not self.raw.numel():
            return BINS, 0
        if compiled := kernels.compiled_for(self.raw):
            return compiled.filled_bins(self.raw, self.keep)
        low, high = (int(each) for each in self._bins.aminmax())
        return low or int(self._bins.where(self._bins > 0, BINS).amin()), high

    def add_to(self, counts: Tensor, first: int) -> None:
        """Adds to counts, (width, columns) of whole numbers, how many values of each unit lie in each bin, in place.

        The first column counts bin 0, and the next ones bins ``first``, ``first`` + 1, ..., which must hold all others.
        """
        width, columns = counts.shape
        if columns * width and self.raw.numel():
            if compiled := kernels.compiled_for(self.raw):
                compiled.add_bins(counts, self.raw, self.keep, first)
                return
            places = (self._bins - (first - 1)).clamp_min_(0)
            places += torch.arange(0, width * columns, columns, dtype=torch.int32, device=places.device)[:, None]
            flat = (places.transpose(1, 2) if places.stride(1) == 1 else places).flatten()  # in the memory's order if it is dense
            counts.view(-1).scatter_add_(0, flat, counts.new_ones(len(flat)))  # twice as fast as ones that are expanded
        if self.keep is not None:
            counts[:, 0] -= self.keep.numel() - self.keep.sum()  # masked rows were counted as zeros

    @cached_property
    def _bins(self) -> Tensor:
        """(samples, width, positions) int32 in the memory layout of the values."""
        # the leading bits of a float32 are its sign and a piecewise linear logarithm of its size
        bits = self.raw.float().view(torch.int32) >> DROPPED
        bins = bits.bitwise_and_(_LEADING).sub_(LOW - 1).clamp_(0, BINS - 1)
        return bins if self.keep is None else bins.where(self.keep[:, None], 0)


def _sizes(raw: Tensor, keep: Tensor | None, wanted: Collection[str]) -> dict[str, Tensor]:
    size, found = magnitude(raw, keep), {}
    if "absolutes" in wanted:
        found["absolutes"] = _over_positions(size)
    if "largest" in wanted:
        found["largest"] = size.amax(2) if size.shape[2] else size.new_zeros(size.shape[:2])
    if "nonzeros" in wanted:
        found["nonzeros"] = _nonzeros(size, keep)
    return found


def magnitude(raw: Tensor, keep: Tensor | None) -> Tensor:
    """|value|, (samples, width, positions); 0 for masked rows."""
    size = raw.abs()
    return size if keep is None else size.where(keep[:, None], 0)


def _nonzeros(size: Tensor, keep: Tensor | None) -> Tensor:
    """How many sizes are not 0, (samples, width); overwrites them."""
    if keep is None and size.device.type == "cpu" and size.numel() and float(size[:1].amin()) > 0 and float(size.amin()) > 0:
        return size.new_full(size.shape[:2], size.shape[2])  # usual before an activation; saves one pass
    return _over_positions(size.sign_())
