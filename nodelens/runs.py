"""Stretches of a batch: runs of samples of one group, pieces that stay in the cache, positions drawn from each sample."""

import torch
from torch import Tensor

from .keys import mix


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


def draw(keys: Tensor, positions: int, count: int, seed: int) -> Tensor | None:
    """A place in each of ``count`` stretches of a sample's positions, (samples, count): the same in any batch or process.

    None where there are no more positions than that.
    """
    if positions <= count:
        return None
    edges = torch.arange(count + 1) * positions // count
    return edges[:-1] + mix(keys[:, None], torch.arange(count), seed) % (edges[1:] - edges[:-1])
