"""Slices of a batch by jackknife group, chunks that fit in the CPU cache, and positions drawn from each sample."""

import torch
from torch import Tensor

from .linalg import maps_by_sample, side_by_side
from .sample_hash import mix


def group_slices(group: Tensor, step: int = 1 << 60) -> list[tuple[int, int, int]]:
    """(group, first, end) of each run of consecutive samples of one group, in order, none longer than ``step``."""
    groups, counts = torch.unique_consecutive(group, return_counts=True)
    ends = counts.cumsum(0).tolist()
    spans = zip(groups.tolist(), counts.tolist(), ends, strict=True)
    return [(g, a, min(a + step, end)) for g, n, end in spans for a in range(end - n, end, step)]


def sorting(group: Tensor) -> Tensor | None:
    """The order that sorts samples by group, stable; None if they are sorted."""
    return None if bool((group.diff() >= 0).all()) else torch.argsort(group, stable=True)


def copy_order(raw: Tensor, group: Tensor) -> Tensor | None:
    """The order in which samples are copied for products of their rows, sorted by group; None if they need not be copied.

    raw (samples, width, positions). Few positions that lie side by side are copied in any case, so that units do.
    """
    order = sorting(group)
    few = not (side_by_side(raw) or maps_by_sample(raw, raw))
    return torch.arange(len(group)) if order is None and few else order


def taken(table: Tensor, order: Tensor | None) -> Tensor:
    """The entries of samples in an order, as copies; the table itself if there is none."""
    return table if order is None else table.index_select(0, order.to(table.device))


def chunks_of(slices: list[tuple[int, int, int]], samples: int, step: int) -> list[tuple[int, int, list[tuple[int, int, int]]]]:
    """Neighbouring group slices merged into chunks of at most ``step`` samples, (first, end, slices); plain chunks if none."""
    if not slices:
        return [(a, min(a + step, samples), []) for a in range(0, samples, step)]
    chunks: list[tuple[int, int, list[tuple[int, int, int]]]] = []
    for g, a, b in slices:
        if chunks and b - chunks[-1][0] <= step:
            first, _, held = chunks.pop()
            chunks.append((first, b, [*held, (g, a, b)]))
        else:
            chunks.append((a, b, [(g, a, b)]))
    return chunks


def draw(hashes: Tensor, keep: Tensor | None, positions: int, count: int, seed: int) -> Tensor | None:
    """Stratified sample of positions: one from each of ``count`` equal segments of a sample's positions, (samples, count).

    It depends on the sample hash alone, so it is the same in any batch or process. Only positions in ``keep`` (samples,
    positions) bool are segmented, so padding changes nothing; a sample with fewer than ``count`` of them gives all of them,
    and some masked ones. None if there are at most ``count`` positions.
    """
    if positions <= count:
        return None
    if keep is None:
        return _in_segments(hashes, torch.full((1, 1), positions), count, seed)
    keep = keep.cpu()
    counts = keep.sum(1, keepdim=True)
    drawn = _in_segments(hashes, counts, count, seed).where(counts > count, torch.arange(count))
    return torch.argsort(~keep, dim=1, stable=True).gather(1, drawn)


def _in_segments(hashes: Tensor, positions: Tensor, count: int, seed: int) -> Tensor:
    """One position from each of ``count`` equal segments of the first ``positions`` (samples, 1)."""
    edges = torch.arange(count + 1) * positions // count
    return edges[:, :-1] + mix(hashes[:, None], torch.arange(count), seed) % (edges[:, 1:] - edges[:, :-1]).clamp_min(1)
