"""The sums of ``reductions`` by the loops of ``loops.c``: each value is read once, and no temporary tensors are made."""

import ctypes
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import compiler, triangle
from .bins import BINS, DROPPED, LOW

COLUMNS = 4096  # of counts, as in the loops
SPLIT = 1 << 15  # values for which one more thread is woken
_POWERS = ("sums", "squares", "cubes", "fourths")
_SIZES = ("absolutes", "nonzeros", "largest")
_SOURCE = Path(__file__).with_name("loops.c")


def reduce(raw: Tensor, keep: Tensor | None, shift: Tensor | None, wanted: Collection[str]) -> dict[str, Tensor]:
    """What is wanted of rows on a CPU, as ``reductions.reduce`` names it, but not ``x``."""
    values, tokens = _values(raw)
    samples, width, positions = raw.shape
    higher, sizes = bool({"cubes", "fourths"} & {*wanted}), bool({*_SIZES} & {*wanted})
    out = raw.new_empty(7, samples, width) if {*_POWERS, *_SIZES} & {*wanted} else None
    norms = raw.new_empty(samples, positions) if "norms" in wanted else None
    skews = raw.new_empty(samples, width) if "skews" in wanted and norms is not None else None
    about = raw.new_zeros(width) if shift is None else _shift(raw, shift)
    mask = _mask(raw, keep)
    rows = _at(values), _at(mask), _at(about), samples, width, positions, tokens
    _library(raw).reduce(*rows, higher, sizes, _at(out), _at(norms), _at(skews), _threads(values))
    tables = [] if out is None else out.unbind(0)
    known = (_POWERS if higher else _POWERS[:2]) + (_SIZES if sizes else ())
    found = {name: table for name, table in zip(_POWERS + _SIZES, tables, strict=False) if name in known}
    return found | {name: each for name, each in (("norms", norms), ("skews", skews)) if each is not None}


def weighted_sums(raw: Tensor, keep: Tensor | None, weights: Tensor) -> Tensor:
    """Sums over positions of rows times weights (samples, positions), (samples, width), in the dtype of the rows."""
    (values, tokens), (samples, width, positions), mask = _values(raw), raw.shape, _mask(raw, keep)
    by, zero = weights.to(raw.dtype).expand(samples, positions).contiguous(), raw.new_zeros(width)
    out = raw.new_empty(samples, width)
    rows = _at(values), _at(mask), _at(zero), _at(by), samples, width, positions, tokens
    _library(raw).weighted(*rows, _at(out), _threads(values))
    return out


def filled_bins(raw: Tensor, keep: Tensor | None) -> tuple[int, int]:
    """The smallest bin above 0 that is filled, ``BINS`` if none is, and the largest one."""
    (values, tokens), mask, found = _values(raw.float()), _mask(raw, keep), (ctypes.c_int32 * 2)()
    library("float32").ends(_at(values), _at(mask), *raw.shape, tokens, LOW << DROPPED, found, _threads(values))
    low, high = (min(max((end >> DROPPED) - (LOW - 1), 0), BINS - 1) for end in found)
    return low if found[0] < (1 << 31) - 1 else BINS, high


def add_bins(counts: Tensor, raw: Tensor, keep: Tensor | None, first: int) -> None:
    """Adds to counts, without gaps, how many values lie in each bin, as ``reductions.Bins.add_to`` does."""
    if len(counts) != raw.shape[1] or counts.shape[1] > COLUMNS or not counts.is_contiguous():
        raise ValueError(f"counts of shape {(*counts.shape,)} are not those of {raw.shape[1]} units, at most {COLUMNS} each")
    (values, tokens), mask, columns = _values(raw.float()), _mask(raw, keep), counts.shape[1]
    bins = DROPPED, first - 1 + LOW - 1, columns
    held = _at(counts), counts.element_size(), _threads(values)
    library("float32").count(_at(values), _at(mask), *raw.shape, tokens, *bins, *held)


def add_products(
    out: Tensor,
    raw: Tensor,
    keep: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    chosen: Sequence[int] | None = None,
) -> None:
    """Adds to out the sum of x x' over the rows x of maps about the shift, each times its scale.

    out: a symmetric matrix (width, width) float64, as ``triangle`` holds it. scale (samples, positions); chosen: the samples, None
    for all. Half of a symmetric product is formed, in the dtype of the rows.
    """
    (samples, width, positions), loops = raw.shape, _library(raw)
    if out.shape != (triangle.size(width),) or out.dtype != torch.float64:
        raise ValueError(f"products of {width} units cannot be added to {out.dtype} of shape {(*out.shape,)}")
    if chosen is not None and not all(0 <= sample < samples for sample in chosen):
        raise IndexError(f"samples {chosen} of {samples}")
    if not width:
        return
    values, mask, about = raw.detach().contiguous(), _mask(raw, keep), _shift(raw, shift)
    scales = None if scale is None else scale.to(raw.dtype).expand(samples, positions).contiguous()
    packed = raw.new_empty(loops.packed_numbers(width))
    order = None if chosen is None else (ctypes.c_int64 * len(chosen))(*chosen)
    count = samples if chosen is None else len(chosen)
    rows = _at(values), _at(mask), _at(about), _at(scales), order
    loops.products(*rows, count, width, positions, _at(packed), _at(out), triangle.rows_of_a_band(width), _threads(values))


def add_maps(sums: Tensor, raw: Tensor, shift: Tensor | None, group: Tensor) -> None:
    """Adds maps about the shift and their squares to those of the group of each sample, sums (2, groups, width x positions)."""
    (samples, width, positions), values = raw.shape, raw.detach().contiguous()
    if sums.shape[::2] != (2, width * positions) or sums.dtype != raw.dtype or not sums.is_contiguous():
        raise ValueError(f"maps of {width} units and {positions} positions cannot be added to sums of shape {(*sums.shape,)}")
    if len(group) != samples or (samples and not 0 <= int(group.min()) <= int(group.max()) < sums.shape[1]):
        raise IndexError(f"{samples} samples cannot be added to {sums.shape[1]} groups by {group}")
    about, order = _shift(raw, shift), group.to("cpu", torch.int64).contiguous()
    held = _at(sums[0]), _at(sums[1]), _threads(values)
    _library(raw).add_maps(_at(values), _at(about), _at(order), samples, width, positions, *held)


def patches(raw: Tensor, shift: Tensor | None, readers: Sequence[Tensor]) -> Tensor:
    """Sums of maps about the shift, and of their squares, over what each offset of a kernel of two dimensions reads.

    raw (samples, width, height x columns); readers (kernel, size) for each dimension -> (2, samples, width x kernel)
    """
    down, across = (each.to(raw.dtype).contiguous() for each in readers)
    (samples, width, positions), values, about = raw.shape, raw.detach().contiguous(), _shift(raw, shift)
    (tall, height), (wide, columns) = down.shape, across.shape
    if height * columns != positions:
        raise ValueError(f"maps of {positions} positions are not those of {height} by {columns}")
    out = raw.new_empty(2, samples, width * tall * wide)
    kernel = _at(down), tall, _at(across), wide
    _library(raw).patches(_at(values), _at(about), samples, width, height, columns, *kernel, _at(out), _threads(values))
    return out


def _library(raw: Tensor) -> Any:
    return library(str(raw.dtype).removeprefix("torch."))


def _shift(raw: Tensor, shift: Tensor | None) -> Tensor | None:
    return None if shift is None else shift.to(raw.dtype).expand(raw.shape[1]).contiguous()


def _values(raw: Tensor) -> tuple[Tensor, bool]:
    """The values without gaps, and whether the units come last, (samples, positions, width), as in tokens."""
    raw = raw.detach()
    tokens = raw.shape[2] == 1 or raw.stride(1) == 1
    return (raw.transpose(1, 2) if tokens else raw).contiguous(), tokens


def _mask(raw: Tensor, keep: Tensor | None) -> Tensor | None:
    return None if keep is None else keep.expand(len(raw), raw.shape[2]).contiguous()


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threads(values: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), values.numel() // SPLIT))


@cache
def library(dtype: str) -> Any:
    """The loops for rows of a dtype, float32 or float64. Raises OSError, with what the compiler said, if they cannot be had."""
    found = compiler.load(_SOURCE, "float" if dtype == "float32" else "double")
    pointer, number, whole = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    shape = [whole, whole, whole, number]
    found.reduce.argtypes = [pointer, pointer, pointer, *shape, number, number, pointer, pointer, pointer, number]
    found.weighted.argtypes = [pointer, pointer, pointer, pointer, *shape, pointer, number]
    found.ends.argtypes = [pointer, pointer, *shape, ctypes.c_int32, pointer, number]
    found.count.argtypes = [pointer, pointer, *shape, number, ctypes.c_int32, ctypes.c_int32, pointer, number, number]
    found.products.argtypes = [*[pointer] * 5, whole, whole, whole, pointer, pointer, whole, number]
    found.add_maps.argtypes = [pointer, pointer, pointer, whole, whole, whole, pointer, pointer, number]
    found.patches.argtypes = [pointer, pointer, whole, whole, whole, whole, pointer, whole, pointer, whole, pointer, number]
    found.packed_numbers.argtypes, found.packed_numbers.restype = [whole], whole
    for each in (found.reduce, found.weighted, found.ends, found.count, found.products, found.add_maps, found.patches):
        each.restype = None
    return found
