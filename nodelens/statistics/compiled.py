"""Compiled loops over rows: every sum of a sample from one read. Imported only where numba is installed and chosen.

Loops take the rows as one line of memory and the steps between samples and between units (or positions), so that any view works
whose positions, or whose units, are next to each other. They release the interpreter, and samples are divided among
torch's threads.
"""

import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .bins import BINS, DROPPED, LOW
from .jit import compiled

BLOCK = 512  # values that are summed in the dtype of the rows, before these parts are added in float64
ROWS = 64  # rows of tokens that are summed in their dtype
UNITS = 32  # squares of units that a norm sums in their dtype
SPLIT = 1 << 17  # values per thread below which a thread costs more than it saves
_POWERS = ("sums", "squares", "cubes", "fourths")
_TABLES = (*_POWERS, "absolutes", "nonzeros")
_BITS = {torch.float32: (torch.int32, np.int32(0x7FFFFFFF)), torch.float64: (torch.int64, np.int64(0x7FFFFFFFFFFFFFFF))}


def reduce(
    raw: Tensor, keep: Tensor | None, shift: Tensor | None, wanted: Collection[str], samples: Tensor | None, copied: bool
) -> dict[str, Tensor]:
    """As ``reductions.reduce``."""
    (_, width, positions), (as_bits, positive) = raw.shape, _BITS[raw.dtype]
    maps, count = raw.stride(2) == 1, len(raw) if samples is None else len(samples)
    order = torch.arange(count) if samples is None else samples
    tables = torch.zeros(len(_TABLES), count, width, dtype=raw.dtype)
    largest = torch.zeros(count, width, dtype=as_bits)
    norms = torch.zeros((count, positions) if "norms" in wanted else (0, 0), dtype=torch.float64)
    shape = (width, count, positions) if maps else (count, positions, width)
    x = torch.empty(shape if copied else (0, 0, 0), dtype=raw.dtype)
    same = torch.empty(shape if copied and shift is not None else (0, 0, 0), dtype=raw.dtype)
    line, own = _line(raw), torch.zeros(width, dtype=raw.dtype) if shift is None else shift.to(raw.dtype).expand(width).contiguous()
    steps = np.array([width, positions, raw.stride(0), raw.stride(1) if maps else raw.stride(2)])
    level = max([0, *(1 + _POWERS.index(name) for name in wanted if name in _POWERS)])
    sizes = bool({"absolutes", "nonzeros", "largest"} & {*wanted})
    options = np.array([level, sizes, "norms" in wanted, copied, keep is not None, shift is not None])
    given = (line, line.view(as_bits), order, own, _mask(keep).view(-1))
    results = (tables, largest, norms, x, same)
    arrays = [t.numpy() for t in given], [t.view(-1).numpy() if t is x or t is same else t.numpy() for t in results]
    _divided(_maps if maps else _tokens, count, width * positions, *arrays[0], steps, options, positive, *arrays[1])
    found = {name: table for name, table in zip(_TABLES, tables, strict=True) if name in wanted}
    if copied:
        found["x"], same = (t.transpose(0, 1) if maps else t.transpose(1, 2) for t in (x, same))
        found["raw"] = found["x"] if shift is None else same
    found |= {"largest": largest.view(raw.dtype)} if "largest" in wanted else {}
    return found | ({"norms": norms.to(raw.dtype)} if "norms" in wanted else {})


def add_bins(counts: Tensor, raw: Tensor, keep: Tensor | None) -> None:
    """As ``reductions.add_bins``."""
    maps, (samples, width, positions) = raw.stride(2) == 1, raw.shape
    steps = np.array([samples, positions, raw.stride(0), raw.stride(1) if maps else raw.stride(2)])
    loop, masked = _bins_of_maps if maps else _bins_of_tokens, keep is not None
    _divided(loop, width, samples * positions, _line(raw).numpy(), _mask(keep).numpy(), masked, steps, counts.numpy())


def compile_loops(dtype: torch.dtype) -> None:
    """Compiles the loops for rows of a dtype, or reads their machine code, so that the first batch does not have to."""
    for raw in (torch.ones(2, 3, 4, dtype=dtype), torch.ones(2, 4, 3, dtype=dtype).transpose(1, 2)):
        reduce(raw, None, None, (*_TABLES, "largest", "norms"), None, copied=True)
        add_bins(torch.zeros(3, BINS, dtype=torch.int64), raw, None)


def _line(raw: Tensor) -> Tensor:
    """The memory from the first value to the last, as one line."""
    end = 1 + sum((size - 1) * step for size, step in zip(raw.shape, raw.stride(), strict=True))
    return raw.detach().as_strided((end,), (1,))


def _mask(keep: Tensor | None) -> Tensor:
    return torch.ones(1, 1, dtype=torch.bool) if keep is None else keep.contiguous()


def _divided(loop: Callable[..., None], count: int, each: int, *arguments: Any) -> None:
    """Calls a loop on items 0..count-1, ``each`` values long, divided among as many threads as torch has."""
    threads = max(1, min(torch.get_num_threads(), count, count * each // SPLIT))
    if threads == 1:
        loop(*arguments, 0, count)
        return
    cuts = [count * k // threads for k in range(threads + 1)]
    for _ in _threads(os.getpid(), threads).map(lambda a, b: loop(*arguments, a, b), cuts[:-1], cuts[1:]):
        pass


@cache
def _threads(process: int, count: int) -> ThreadPoolExecutor:
    """Threads of a process; after a fork, the child has none of its parent's."""
    return ThreadPoolExecutor(count, thread_name_prefix="nodelens-rows")


# Places in memory are unsigned and steps of loops are one, or LLVM would not add several values at once.


@compiled
def _powers(v, start, count, level):
    """The sums of the first four powers of values, in float64 over blocks; those above ``level`` are 0."""
    t1, t2, t3, t4 = 0.0, 0.0, 0.0, 0.0
    for a in range(start, start + count, np.uint64(BLOCK)):
        s1, s2, s3, s4 = v.dtype.type(0), v.dtype.type(0), v.dtype.type(0), v.dtype.type(0)
        b = min(start + count, a + np.uint64(BLOCK))
        if level == 1:
            for p in range(a, b):
                s1 += v[p]
        elif level == 2:
            for p in range(a, b):
                s1 += v[p]
                s2 += v[p] * v[p]
        else:
            for p in range(a, b):
                square = v[p] * v[p]
                s1 += v[p]
                s2 += square
                s3 += square * v[p]
                s4 += square * square
        t1 += s1
        t2 += s2
        t3 += s3
        t4 += s4
    return t1, t2, t3, t4


@compiled
def _sizes(v, bits, start, count, positive):
    """The sum of |v|, the number of v that are not zero, and the largest |v| as bits, which have the order of |v|."""
    total, nonzero, most = 0.0, 0, bits.dtype.type(0)
    for a in range(start, start + count, np.uint64(BLOCK)):
        part, number = v.dtype.type(0), bits.dtype.type(0)
        for p in range(a, min(start + count, a + np.uint64(BLOCK))):
            size = bits.dtype.type(bits[p] & positive)
            part += abs(v[p])
            number = bits.dtype.type(number + bits.dtype.type(size != 0))
            most = max(most, size)
        total += part
        nonzero += number
    return total, nonzero, most


@compiled
def _less(v, start, count, shift, out, at):
    for p in range(count):
        out[at + p] = v[start + p] - shift


@compiled
def _chosen(v, start, count, keep, at, out, to):
    zero = v.dtype.type(0)
    for p in range(count):
        out[to + p] = v[start + p] if keep[at + p] else zero


@compiled
def _add_squares(v, start, count, out):
    for p in range(count):
        out[p] += v[start + p] * v[start + p]


@compiled
def _maps(line, bits, samples, shift, keep, steps, options, positive, tables, largest, norms, x, same, first, last):
    """Samples first..last-1 of rows whose positions are next to each other."""
    units, positions, by_sample, by_unit = steps[0], np.uint64(steps[1]), steps[2], steps[3]
    level, sizes, with_norms, copied, masked, shifted = options[0], options[1], options[2], options[3], options[4], options[5]
    values, value_bits, norm = np.empty(steps[1], line.dtype), np.empty(steps[1], bits.dtype), np.zeros(steps[1], line.dtype)
    for i in range(first, last):
        k = np.uint64(samples[i] * steps[1])
        for c in range(units):
            start, to = np.uint64(samples[i] * by_sample + c * by_unit), np.uint64((c * samples.size + i) * steps[1])
            row, row_bits, a = line, bits, start
            if masked:
                _chosen(line, start, positions, keep, k, values, np.uint64(0))
                _chosen(bits, start, positions, keep, k, value_bits, np.uint64(0))
                row, row_bits, a = values, value_bits, np.uint64(0)
            if sizes:
                tables[4, i, c], tables[5, i, c], largest[i, c] = _sizes(row, row_bits, a, positions, positive)
            v = row
            if copied or shifted:
                v, b = (x, to) if copied else (values, np.uint64(0))
                if copied and shifted:
                    _less(row, a, positions, line.dtype.type(0), same, to)
                _less(row, a, positions, shift[c], v, b)
                if masked and shifted:
                    _chosen(v, b, positions, keep, k, v, b)
                a = b
            if level:
                tables[0, i, c], tables[1, i, c], tables[2, i, c], tables[3, i, c] = _powers(v, a, positions, level)
            if with_norms:
                _add_squares(v, a, positions, norm)
                if c % UNITS == UNITS - 1 or c == units - 1:
                    for p in range(norm.size):
                        norms[i, p] += norm[p]
                    norm[:] = 0


@compiled
def _add_row_powers(v, start, count, level, part):
    n = np.uint64(count)
    if level == 1:
        for c in range(n):
            part[c] += v[start + c]
    elif level == 2:
        for c in range(n):
            part[c] += v[start + c]
            part[n + c] += v[start + c] * v[start + c]
    else:
        for c in range(n):
            square = v[start + c] * v[start + c]
            part[c] += v[start + c]
            part[n + c] += square
            part[2 * n + c] += square * v[start + c]
            part[3 * n + c] += square * square


@compiled
def _add_row_sizes(v, bits, start, count, positive, part, most):
    n, one, zero = np.uint64(count), v.dtype.type(1), v.dtype.type(0)
    for c in range(n):
        size = bits.dtype.type(bits[start + c] & positive)
        part[4 * n + c] += abs(v[start + c])
        part[5 * n + c] += one if size != 0 else zero
        most[c] = max(most[c], size)


@compiled
def _tokens(line, bits, samples, shift, keep, steps, options, positive, tables, largest, norms, x, same, first, last):
    """Samples first..last-1 of rows whose units are next to each other."""
    units, positions, by_sample, by_position = np.uint64(steps[0]), steps[1], steps[2], steps[3]
    level, sizes, with_norms, copied, masked, shifted = options[0], options[1], options[2], options[3], options[4], options[5]
    total, part, values = np.zeros(6 * units), np.zeros(6 * units, line.dtype), np.empty(units, line.dtype)
    for i in range(first, last):
        total[:] = 0
        most = largest[i]
        for p in range(positions):
            start, to = np.uint64(samples[i] * by_sample + p * by_position), np.uint64((i * positions + p) * steps[0])
            if not masked or keep[samples[i] * positions + p]:
                v, a = line, start
                if sizes:
                    _add_row_sizes(line, bits, start, units, positive, part, most)
                if copied or shifted:
                    v, a = (x, to) if copied else (values, np.uint64(0))
                    for c in range(units):
                        v[a + c] = line[start + c] - shift[c]
                    if copied and shifted:
                        _less(line, start, units, line.dtype.type(0), same, to)
                if level:
                    _add_row_powers(v, a, units, level, part)
                if with_norms:
                    norms[i, p] = _powers(v, a, units, 2)[1]
            elif copied:
                for c in range(units):
                    x[to + c] = 0
                    if shifted:
                        same[to + c] = 0
            if p % ROWS == ROWS - 1 or p == positions - 1:
                for c in range(part.size):
                    total[c] += part[c]
                part[:] = 0
        for t in range(6):
            for c in range(steps[0]):
                tables[t, i, c] = total[t * steps[0] + c]


@compiled
def _count(row: Any, kept: Any, masked: bool, step: int, size: int, single: Any, places: Any, counts: Any) -> None:
    """Adds the bins of every ``step``-th value of a row."""
    for p in range(size):
        single[p] = row[p * step]
    found = single.view(np.int32)
    for p in range(size):
        places[p] = min(max(((found[p] & 0x7FFFFFFF) >> DROPPED) - (LOW - 1), 0), BINS - 1)
    for p in range(size):
        counts[places[p]] += 1 if not masked or kept[p] else 0


@compiled
def _bins_of_maps(line, keep, masked, steps, counts, first, last):
    """Units first..last-1 of rows whose positions are next to each other."""
    samples, positions, by_sample, by_unit = steps[0], steps[1], steps[2], steps[3]
    single, places = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.int32)
    for c in range(first, last):
        for i in range(samples):
            for a in range(0, positions, BLOCK):
                b = min(positions, a + BLOCK)
                start = i * by_sample + c * by_unit
                kept = keep[i, a:b] if masked else keep[0]
                _count(line[start + a : start + b], kept, masked, 1, b - a, single, places, counts[c])


@compiled
def _bins_of_tokens(line, keep, masked, steps, counts, first, last):
    """Units first..last-1 of rows whose units are next to each other, 16 at a time, which share a cache line."""
    samples, positions, by_sample, by_position = steps[0], steps[1], steps[2], steps[3]
    single, places = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.int32)
    for unit in range(first, last, 16):
        for i in range(samples):
            for a in range(0, positions, BLOCK):
                b = min(positions, a + BLOCK)
                kept = keep[i, a:b] if masked else keep[0]
                for c in range(unit, min(last, unit + 16)):
                    start = i * by_sample + a * by_position + c
                    _count(line[start:], kept, masked, by_position, b - a, single, places, counts[c])
