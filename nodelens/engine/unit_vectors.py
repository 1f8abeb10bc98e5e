"""Vectors over the units of a layer: a basis, or random signs."""

from collections.abc import Iterator

import torch
from torch import Tensor

from nodelens.metrics.derivative import Derivative
from nodelens.network.batch import Batch
from nodelens.network.random_vectors import signs

from .derivative_collector import LayerCall


def unit_vectors(
    call: LayerCall, derivative: Derivative, keep: Tensor, batch: Batch, seed: int, size: int
) -> Iterator[tuple[int, Tensor]]:
    """Vectors (k, *shape of the layer's tensor), at most ``size`` at once, with the fold that they belong to.

    The basis has one vector per unit and position, the same for all samples; signs are independent for each row. Rows that do
    not count, in ``keep`` (samples, positions), have zeros.
    """
    index, like = call.index, call.traced.value
    samples, units, positions = index.shape
    mask = keep.to(like.device)
    if derivative.method == "probes":
        m, numbers = derivative.vectors, call.numbers if call.chosen is None else call.numbers.gather(1, call.chosen)
        for fold in range(derivative.folds):
            every = range(fold, m, derivative.folds)
            for a in range(0, len(every), size):
                v = signs(batch.hashes, numbers, units, every[a : a + size], seed, "units", like) / m**0.5
                yield fold, _placed(index, v.where(mask[..., None], 0).transpose(2, 3), like)
        return
    for a in range(0, units * positions, size):
        number = torch.arange(a, min(a + size, units * positions), device=like.device)
        each = torch.arange(len(number), device=like.device)
        v = torch.zeros(len(number), samples, units, positions, dtype=like.dtype, device=like.device)
        v[each, :, number % units, number // units] = 1
        yield 0, _placed(index, v.where(mask[:, None], 0), like)


def _placed(index: Tensor, values: Tensor, like: Tensor) -> Tensor:
    """Values (k, samples, units, positions) in the layout of the layer's tensor, zeros elsewhere."""
    flat = torch.zeros(len(values), like.numel(), dtype=like.dtype, device=like.device)
    return flat.index_copy_(1, index.flatten(), values.flatten(1)).reshape(len(values), *like.shape)
