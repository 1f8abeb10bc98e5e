"""Stretches of a batch: runs of samples of one group, pieces that stay in the cache, positions drawn from each sample."""

import torch
from torch import Tensor

from .sample_hash import mix


def runs_of(group: Tensor, step: int = 1 << 60) -> list[tuple[int, int, int]]:
    """(group, first, last) of each run of samples of one group, in order, none longer than ``step``."""
    groups, counts = torch.unique_consecutive(group, return_counts=True)
    ends = counts.cumsum(0).tolist()
    runs = zip(groups.tolist(), counts.tolist(), ends, strict=True)
    return [(g, a, min(a + step, end)) for g, n, end in runs for a in range(end - n, end, step)]


def chunks_of(runs: list[tuple[int, int, int]], samples: int, step: int) -> list[tuple[int, int, list[tuple[int, int, int]]]]:
    """(first, last, runs) of neighbouring runs, as many as ``step`` samples hold; without runs, stretches of samples."""
    if not runs:
        return [(a, min(a + step, samples), []) for a in range(0, samples, step)]
    chunks: list[tuple[int, int, list[tuple[int, int, int]]]] = []
    for g, a, b in runs:
        if chunks and b - chunks[-1][0] <= step:
            first, _, held = chunks.pop()
            chunks.append((first, b, [*held, (g, a, b)]))
        else:
            chunks.append((a, b, [(g, a, b)]))
    return chunks


def draw(keys: Tensor, keep: Tensor | None, positions: int, count: int, seed: int) -> Tensor | None:
    """A place in each of ``count`` stretches of a sample's positions, (samples, count): the same in any batch or process.

    Of the positions that count, ``keep`` (samples, positions) bool, so that padding moves none; a sample that has fewer than that
    gives all of them, and places that do not count. None where there are no more positions than that.
    """
    if positions <= count:
        return None
    if keep is None:
        return _in_stretches(keys, torch.full((1, 1), positions), count, seed)
    keep = keep.cpu()
    counts = keep.sum(1, keepdim=True)
    drawn = _in_stretches(keys, counts, count, seed).where(counts > count, torch.arange(count))
    return torch.argsort(~keep, dim=1, stable=True).gather(1, drawn)


def _in_stretches(keys: Tensor, positions: Tensor, count: int, seed: int) -> Tensor:
    """One of the first ``positions`` (samples, 1) in each of ``count`` stretches of them."""
    edges = torch.arange(count + 1) * positions // count
    return edges[:, :-1] + mix(keys[:, None], torch.arange(count), seed) % (edges[:, 1:] - edges[:, :-1]).clamp_min(1)
