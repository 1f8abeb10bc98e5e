"""Sample hashes, which decide the jackknife group and the drawn positions of a sample in any batch, order or process."""

import numpy as np
import torch
from torch import Tensor

_LIMIT = 4096  # entries of a sample that its content hash reads
_CHUNK = 1 << 15  # entries that are hashed at once, so that they stay in the cache
_WORD = (1 << 64) - 1
_STEPS = [(np.uint64(by), np.uint64(factor)) for by, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))]


def mix(*parts: Tensor | int) -> Tensor:
    """Element-wise hash, non-negative int64, of integers that broadcast. SplitMix64 (Steele, Lea & Flood 2014)."""
    state = torch.zeros((), dtype=torch.int64)
    for part in parts:
        state = _scramble(state + part + _signed(0x9E3779B97F4A7C15))
    return state & 0x7FFFFFFFFFFFFFFF


def groups_of(hashes: Tensor, groups: int, seed: int = 0, cuts: Tensor | None = None) -> Tensor:
    """The jackknife group of each sample, (B,) int64 in [0, groups): the remainder of its hash, or its place in ``cuts``."""
    if groups == 1:
        return torch.zeros_like(hashes)
    mixed = mix(hashes, seed)
    return mixed % groups if cuts is None else torch.searchsorted(cuts, mixed, right=True)


def balanced_cuts(hashes: Tensor, groups: int, seed: int = 0) -> Tensor:
    """Hashes that divide the given samples into groups of equal size, to within one sample, (n,) -> (groups - 1,) int64.

    They depend on the set of samples alone, and samples with the same hash stay together. With fewer samples than groups, as many
    groups are filled as there are samples.
    """
    ordered = mix(hashes, seed).sort().values
    ends = (torch.arange(1, groups) * len(ordered) + groups - 1) // groups
    return torch.cat([ordered, torch.full((1,), torch.iinfo(torch.int64).max)])[ends.clamp_max(len(ordered))]


def content_hashes(x: Tensor) -> Tensor:
    """Hash of the content of each sample, (B, ...) -> (B,) int64: equal for equal samples, in any process."""
    rows = x.detach().flatten(1) if x.ndim > 1 else x.detach()[:, None]
    rows = rows[:, :: max(1, rows.shape[1] // _LIMIT)]
    if rows.is_floating_point():
        rows = rows.float().contiguous().view(torch.int32)
    place = mix(torch.arange(rows.shape[1])).to(rows.device)
    step = max(1, _CHUNK // max(1, rows.shape[1]) if rows.device.type == "cpu" else len(rows))
    return mix(torch.cat([_scramble(part.long() + place).sum(1) for part in rows.split(step)]))


def _scramble(z: Tensor) -> Tensor:
    """The scrambled integers; on a CPU they replace those in ``z``, without a copy for each step."""
    if z.device.type == "cpu":
        z = z.contiguous()
        flat = z.numpy().view(np.uint64).reshape(-1)
        for a in range(0, len(flat), _CHUNK):
            _scramble_array(flat[a : a + _CHUNK])
        return z
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _scramble_array(z: np.ndarray) -> None:
    """The same in place, of uint64, whose shift needs no mask."""
    shifted = np.empty_like(z)
    for by, factor in _STEPS:
        z ^= np.right_shift(z, by, out=shifted)
        z *= factor
    z ^= np.right_shift(z, np.uint64(31), out=shifted)


def _shift(z: Tensor, by: int) -> Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)  # torch's >> is arithmetic and keeps the sign


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def generator(seed: int, *words: str) -> torch.Generator:
    """A generator seeded from a number and names, the same in any process; torch's global generator is not touched."""
    parts: list[int] = []
    for text in map(str.encode, words):
        parts += [len(text), *(int.from_bytes(text[k : k + 7]) for k in range(0, len(text), 7))]
    return torch.Generator().manual_seed(_mixed_numbers(seed, *parts))


def _mixed_numbers(*numbers: int) -> int:
    """``mix`` of numbers alone, without tensors: hundreds of generators are made for a pruning."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _WORD
        for by, factor in _STEPS:
            state = ((state ^ (state >> int(by))) * int(factor)) & _WORD
        state ^= state >> 31
    return state & (_WORD >> 1)
