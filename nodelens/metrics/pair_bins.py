"""Information that pairs of units carry about a class, from histograms whose bins hold equal shares of the rows."""

import ctypes
import math
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from nodelens.statistics import compiler, kernels

_BLOCK = 1 << 18  # counts formed at once: they stay in the cache of a core
_MOST = 1000  # bits of a product in float64: it overflows beyond 1,023
_UNITS = 64  # the loops take blocks of so many
_LARGEST = 256  # number of bins that the loops tell apart
_ROUNDING = 1e-5  # of a column's range: differences that float32 activations of the same input may have


def quantile_bins(x: Tensor, bins: int) -> Tensor:
    """The bin of each entry, (n, d) -> (n, d) int64: how many of the column's quantiles 1/bins, 2/bins, ... lie below it.

    Equal entries share a bin, so all zeros of a unit behind a ReLU are in one bin. Entries are equal if they differ by less than
    1e-5 of the column's range: edges lie between entries that rounding cannot exchange, so that batches change no bin.
    """
    n, columns = len(x), x.T.contiguous()  # (d, n)
    places = (torch.arange(1, bins, device=x.device) * n + bins - 1) // bins - 1  # of order statistics
    ordered = torch.cat([_sorted(columns), x.new_full((len(columns), 1), torch.inf)], 1)
    apart = ordered.diff(dim=1) > _ROUNDING * (ordered[:, n - 1 : n] - ordered[:, :1])  # (d, n); the last is always true
    gap = torch.where(apart, torch.arange(n, device=x.device), n - 1).flip(1).cummin(1).values.flip(1)  # the next one
    below = gap[:, places.clamp_min(0)]
    edges = 0.5 * (ordered.gather(1, below) + ordered.gather(1, below + 1))  # (d, bins - 1)
    first = torch.ones_like(edges, dtype=torch.bool)
    first[:, 1:] = edges[:, 1:] > edges[:, :-1]
    edges = _sorted(edges.where(first, torch.inf))  # equal quantiles count once
    return torch.searchsorted(edges, columns).T


def _sorted(x: Tensor) -> Tensor:
    """Each row in ascending order; by numpy on a CPU, which is faster as it keeps no indices."""
    return torch.from_numpy(np.sort(x.numpy(), axis=1)) if x.device.type == "cpu" else x.sort(1).values


def class_information_of_pairs(bins_of_units: Tensor, label: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Plug-in information about the class of each unit, (d,), and of each pair, (d, d); the diagonal is that of the unit.

    Shapes: bins_of_units (n, d) and label (n,), int64, from 0. I = H(c) + H(bins) - H(c, bins). Loops in C, if they are in use,
    take a fifth to a ninth of the time.
    """
    rows, n = bins_of_units.cpu(), len(label)
    kinds = label.cpu().unique(return_inverse=True)[1]
    sizes = kinds.bincount()
    within, loops = rows[kinds.argsort(stable=True)], _loops() if kernels.are_compiled() and bins <= _LARGEST else None
    if loops is None:
        pairs = _terms_of_sets(within, sizes, bins) - _sum_over_cells(rows, bins)
    else:
        pairs = _terms_by_loops(loops, within, sizes, bins) - _terms_by_loops(loops, within, sizes.sum(0, keepdim=True), bins)
    pairs = (pairs.triu() + pairs.triu(1).T - torch.special.xlogy(sizes, sizes.double()).sum() + n * math.log(n)) / n
    return pairs.diagonal().to(label.device, copy=True), pairs.to(label.device)


def _terms_of_sets(rows: Tensor, sizes: Tensor, bins: int) -> Tensor:
    """The sum of m ln m over the joint bins of two units in each set of rows, which follow one another, (d, d), as below."""
    sets = rows.split(sizes.tolist())
    found = _sum_over_rows([each for each in sets if len(each) < bins * bins], rows.shape[1])
    for each in sets:
        if len(each) >= bins * bins:
            found += _sum_over_cells(each, bins)
    return found


def _terms_by_loops(loops: Any, rows: Tensor, sizes: Tensor, bins: int) -> Tensor:
    """The same by loops in C."""
    (n, d), threads, ends = rows.shape, torch.get_num_threads(), sizes.cumsum(0)
    of = pad(rows.to(torch.uint8), (0, -d % _UNITS))
    width, numbers = of.shape[1], torch.arange(n + 1, dtype=torch.float64)
    masks = torch.empty(loops.mask_numbers(ends.data_ptr(), len(ends), bins, width), dtype=torch.int64)
    terms, scratch = torch.special.xlogy(numbers, numbers), torch.empty(2 * threads * n, dtype=torch.int32)
    found = torch.zeros(width, width, dtype=torch.float64)
    given = of.data_ptr(), ends.data_ptr(), len(ends), width, bins, terms.data_ptr(), masks.data_ptr(), scratch.data_ptr()
    loops.add_terms(*given, found.data_ptr(), threads)
    return found[:d, :d]


@cache
def _loops() -> Any:
    """The loops of ``pair_bins.c``; None where they cannot be compiled."""
    try:
        found = compiler.load(Path(__file__).with_name("pair_bins.c"), "double")
    except OSError:
        return None
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    found.mask_numbers.argtypes, found.mask_numbers.restype = [pointer, whole, whole, whole], whole
    found.add_terms.argtypes, found.add_terms.restype = [pointer, pointer, *[whole] * 3, *[pointer] * 4, ctypes.c_int], None
    return found


def _sum_over_cells(rows: Tensor, bins: int) -> Tensor:
    """The sum of m ln m over the joint bins of two units, m the rows in the bin, (d, d), in the upper triangle.

    Bins are masks of rows. The bits that two have in common are counted faster than by a product of matrices of zeros and ones.
    """
    n, d = rows.shape
    numbers = torch.arange(n + 1, dtype=torch.float64)
    terms, masks, found = torch.special.xlogy(numbers, numbers), _masks(rows, bins), torch.zeros(d, d, dtype=torch.float64)
    for a, b in _blocks(d, bins * bins):
        first, second = masks[:, :, a].reshape(len(masks), -1, 1), masks[:, :, b].reshape(len(masks), 1, -1)
        count = np.bitwise_count(first[0] & second[0]).astype(np.uint8 if n < 256 else np.int32, copy=False)
        for left, right in zip(first[1:], second[1:], strict=True):
            count += np.bitwise_count(left & right)
        cells = terms.index_select(0, torch.from_numpy(count).int().flatten()).view(bins, -1)
        found[a, b] = cells.sum(0).view(a.stop - a.start, bins, -1).sum(1)  # one axis after the other, which is faster
    return found


def _masks(rows: Tensor, bins: int) -> np.ndarray:
    """For each 64 rows, bin and unit the rows that are in the bin, as bits of a number: (n / 64, bins, d) uint64."""
    member = (rows[:, None] == torch.arange(bins)[:, None]).numpy()
    packed = np.zeros((-(-len(rows) // 64) * 8, bins, rows.shape[1]), np.uint8)
    packed[: -(-len(rows) // 8)] = np.packbits(member, axis=0)
    return np.ascontiguousarray(np.moveaxis(packed.reshape(-1, 8, *packed.shape[1:]), 1, -1)).view(np.uint64)[..., 0]


def _sum_over_rows(classes: Sequence[Tensor], width: int) -> Tensor:
    """The same, added over classes: it equals the sum of ln m over the rows, which is shorter where rows are few.

    Logarithms are taken of products of the m, of as many as float64 holds.
    """
    found, product, bits = torch.zeros(width, width, dtype=torch.float64), torch.ones(width, width, dtype=torch.float64), 0.0
    for rows in classes:
        each = math.log2(max(2, len(rows)))  # bits of the largest m
        for some in rows.split(int(_MOST / each)):
            if bits + len(some) * each > _MOST:
                found, bits = found + product.log(), 0.0
                product.fill_(1)
            same = (some[:, None] == rows).float()  # (some, n, d)
            for a, b in _blocks(width, len(some)):
                product[a, b] *= _product(same[:, :, a].mT @ same[:, :, b], len(rows))
            bits += len(some) * each
    return found + product.log()


def _product(count: Tensor, most: int) -> Tensor:
    """The product over the first axis, of whole numbers from 1 to ``most`` in float32, in float64."""
    exact = max(1, int(24 / math.log2(max(2, most))))  # so many factors have a product without rounding in float32
    first, *rest = (part.prod(0) for part in count.split(exact))
    product = first.double()
    for part in rest:
        product *= part
    return product


def _blocks(width: int, each: int) -> Iterator[tuple[slice, slice]]:
    """Blocks (rows, columns) over the upper triangle of a matrix of this width, ``each`` counts per entry."""
    first = 0
    while first < width:
        last = min(width, first + max(1, _BLOCK // (each * (width - first))))
        yield slice(first, last), slice(first, width)
        first = last
