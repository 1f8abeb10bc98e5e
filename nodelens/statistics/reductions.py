"""Sums over the positions of each sample, and counts of sizes: one function for each, for all that a site needs of its rows."""

from collections.abc import Collection

import torch
from torch import Tensor

from .bins import BINS, DROPPED, LOW

SUMS = ("sums", "squares", "cubes", "fourths", "absolutes", "nonzeros", "largest")


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
    x, raw     (n, width, positions)  values about the shift, 0 for masked rows, and as they are
    sums, squares, cubes, fourths  (n, width)  sums of powers about the shift
    absolutes, nonzeros, largest   (n, width)  sums of |value|, number of non-zero values, largest |value|, none of them shifted
    norms      (n, positions)         squared norms of the rows about the shift

    all in the dtype of the rows. A sum of squares of P float32 values has a relative error of at most 2^-24 (P + 3). A NaN or an
    infinity makes the sums of its unit and sample non-finite.
    """
    if samples is not None:
        samples = samples.to(raw.device)
        raw, keep = raw[samples], None if keep is None else keep[samples]
    x = raw if shift is None else raw - shift.to(raw.dtype)[:, None]
    x = x if keep is None else x.where(keep[:, None], 0)
    found = {"x": x, "raw": raw}
    if "sums" in wanted:
        found["sums"] = x[:, :, 0] if x.shape[2] == 1 else x.sum(2)
    if "squares" in wanted:
        found["squares"] = torch.linalg.vector_norm(x, dim=2).square()  # the only reduction of squares without a copy
    if "cubes" in wanted or "fourths" in wanted:
        square = x.square()
        found["cubes"], found["fourths"] = (square * x).sum(2), torch.linalg.vector_norm(square, dim=2).square()
    if "norms" in wanted:
        found["norms"] = x.square().sum(1)
    return found | (_sizes(raw, keep, wanted) if {"absolutes", "nonzeros", "largest"} & {*wanted} else {})


def add_bins(counts: Tensor, raw: Tensor, keep: Tensor | None) -> None:
    """Adds to counts, (width, BINS) of whole numbers, how many of the |values| of each unit lie in each bin, in place."""
    places, flat = _bin_places(raw, keep), counts.view(-1)
    if len(places) < len(flat):  # value by value if there are fewer values than bins
        flat.scatter_add_(0, places.long(), flat.new_ones(1).expand(len(places)))
    else:
        flat.add_(torch.bincount(places, minlength=len(flat)))
    if keep is not None:
        counts[:, 0] -= keep.numel() - keep.sum()  # masked rows were counted as zeros


def _sizes(raw: Tensor, keep: Tensor | None, wanted: Collection[str]) -> dict[str, Tensor]:
    size, found = magnitude(raw, keep), {}
    if "absolutes" in wanted:
        found["absolutes"] = size.sum(2)
    if "nonzeros" in wanted:
        found["nonzeros"] = _nonzeros(size, keep)
    if "largest" in wanted:
        found["largest"] = size.amax(2) if size.shape[2] else size.new_zeros(size.shape[:2])
    return found


def magnitude(raw: Tensor, keep: Tensor | None) -> Tensor:
    """|value|, (samples, width, positions); 0 for masked rows."""
    size = raw.abs()
    return size if keep is None else size.where(keep[:, None], 0)


def _nonzeros(size: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None and size.device.type == "cpu" and size.numel() and float(size.amin()) > 0:
        return size.new_full(size.shape[:2], size.shape[2])  # usual before an activation; saves one pass
    return size.sign().sum(2)


def _bin_places(raw: Tensor, keep: Tensor | None) -> Tensor:
    """The flat index of the bin that counts each value, in a (units, BINS) table, int32."""
    width = raw.shape[1]
    first = torch.arange(0, width * BINS, BINS, dtype=torch.int32, device=raw.device)[:, None]
    # the leading bits of a float32 are a piecewise linear logarithm; the shift is a copy
    bits = magnitude(raw, keep).float().contiguous().view(torch.int32) >> DROPPED
    return bits.sub_(LOW - 1).clamp_(0, BINS - 1).add_(first).flatten()
