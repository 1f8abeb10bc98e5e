"""Information that pairs of units carry about a class, from histograms whose bins hold equal shares of the rows."""

import math

import torch
from torch import Tensor

_BLOCK = 1 << 20  # cells of joint histograms counted at once
_ROUNDING = 1e-5  # of a column's range: differences that float32 activations of the same input may have


def quantile_bins(x: Tensor, bins: int) -> Tensor:
    """The bin of each entry, (n, d) -> (n, d) int64: how many of the column's quantiles 1/bins, 2/bins, ... lie below it.

    Equal entries share a bin, so all zeros of a unit behind a ReLU are in one bin. Entries are equal if they differ by less than
    1e-5 of the column's range: edges lie between entries that rounding cannot exchange, so that batches change no bin.
    """
    n = len(x)
    places = (torch.arange(1, bins, device=x.device) * n + bins - 1) // bins - 1  # of order statistics
    ordered = torch.cat([x.sort(0).values, x.new_full((1, x.shape[1]), torch.inf)])
    apart = ordered.diff(dim=0) > _ROUNDING * (ordered[n - 1] - ordered[0])  # (n, d); the last is always true
    gap = torch.where(apart, torch.arange(n, device=x.device)[:, None], n - 1).flip(0).cummin(0).values.flip(0)  # the next one
    below = gap[places.clamp_min(0)]
    edges = (0.5 * (ordered.gather(0, below) + ordered.gather(0, below + 1))).T.contiguous()  # (d, bins - 1)
    first = torch.ones_like(edges, dtype=torch.bool)
    first[:, 1:] = edges[:, 1:] > edges[:, :-1]
    edges = edges.where(first, torch.inf).sort(1).values  # equal quantiles count once
    return torch.searchsorted(edges, x.T.contiguous()).T


def class_information_of_pairs(bins_of_units: Tensor, label: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Plug-in information about the class of each unit, (d,), and of each pair, (d, d); the diagonal is that of the unit.

    Shapes: bins_of_units (n, d) and label (n,), int64, from 0. I = H(c) + H(bins) - H(c, bins)
    """
    n, d = bins_of_units.shape
    kinds = label.unique(return_inverse=True)[1]
    within = [bins_of_units[kinds == c] for c in range(int(kinds.max()) + 1)]
    step, pairs = max(1, _BLOCK // (d * bins * bins)), torch.zeros(d, d, dtype=torch.float64, device=label.device)
    for a in range(0, d, step):
        block = -_of_counts(bins_of_units, bins, a, a + step)
        for rows in within:
            block += _of_counts(rows, bins, a, a + step)
        pairs[a : a + step, a:] = block
    sizes = kinds.bincount().double()
    pairs = (pairs.triu() + pairs.triu(1).T - torch.special.xlogy(sizes, sizes).sum() + n * math.log(n)) / n
    return pairs.diagonal().clone(), pairs


def _of_counts(rows: Tensor, bins: int, first: int, last: int) -> Tensor:
    """The sum of m ln m over the joint bins of two units, m the rows in the bin, for units first .. last - 1 and first .. d - 1.

    It equals the sum of ln m over the rows, m the rows in the same joint bin. The shorter of the two sums is computed.
    """
    if len(rows) < bins * bins:
        same = (rows[:, None, first:] == rows[:, first:]).float()  # (n, n, d - first)
        return _sum_of_logs(same[:, :, : last - first].mT @ same, len(rows))
    numbers = torch.arange(len(rows) + 1, dtype=torch.float64, device=rows.device)
    member = torch.nn.functional.one_hot(rows[:, first:], bins).transpose(1, 2).float()  # (n, bins, d - first)
    terms = _looked_up(torch.special.xlogy(numbers, numbers), member[:, :, : last - first].flatten(1).T @ member.flatten(1))
    return terms.unflatten(0, (bins, -1)).sum(0).unflatten(1, (bins, -1)).sum(1)  # one axis after the other, which is faster


def _sum_of_logs(count: Tensor, most: int) -> Tensor:
    """The sum over the first axis of ln m, m whole numbers from 1 to ``most`` in float32. Products of them need few logs."""
    exact = max(1, int(24 / math.log2(max(2, most))))  # so many factors have a product without rounding in float32
    partial = [part.prod(0) for part in count.split(exact)]
    whole = max(1, int(1000 / math.log2(max(2, most))) // exact)  # so many of these do not overflow in float64
    chunks = [partial[a : a + whole] for a in range(0, len(partial), whole)]
    return torch.stack([torch.stack(chunk).prod(0, dtype=torch.float64).log() for chunk in chunks]).sum(0)


def _looked_up(table: Tensor, count: Tensor) -> Tensor:
    """The entries of a table at counts (..., columns): gather is several times faster than indexing."""
    return table.expand(count[..., 0].numel(), -1).gather(1, count.flatten(0, -2).long()).view(count.shape)
