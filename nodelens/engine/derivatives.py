"""What is differentiated in one batch, while its graph is there."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nodelens.metrics import Need
from nodelens.metrics.derivative import Derivative
from nodelens.network.batch import Batch
from nodelens.network.derivatives import Pullback, factor
from nodelens.network.missing import which_count
from nodelens.network.objective import Objective

from .derivative_collector import DerivativeCollector, LayerCall

CHUNK = 1 << 27  # bytes of the vectors that are pulled back at once


class Predictions(NamedTuple):
    """The predictions of a batch, (B, P, K), and which of them count, (B, P) bool."""

    z: Tensor
    counted: Tensor


def differentiate(
    collectors: Sequence[DerivativeCollector], predictions: Tensor, batch: Batch, objective: Objective, seed: int
) -> None:
    """Adds what the needs of all collectors ask for, one kind of derivative after the other."""
    wanted: dict[Derivative, list[tuple[DerivativeCollector, Need, LayerCall]]] = {}
    for collector in collectors:
        for need in collector.sums:
            wanted.setdefault(need.options[0], []).extend((collector, need, call) for call in collector.calls)
    for derivative, places in wanted.items():
        pull_back(derivative, places, predictions_of(derivative, predictions, batch, objective), batch, objective)
    for collector in collectors:
        for call in collector.calls:
            if call.traced.leaf is not None:
                call.traced.leaf.requires_grad_(False)
        collector.calls = []


def predictions_of(derivative: Derivative, predictions: Tensor, batch: Batch, objective: Objective) -> Predictions:
    """The predictions that are differentiated: for a curvature those with a label."""
    labels = batch.labels
    if derivative.of == "curvature" and labels is not None:
        z, y = objective.predictions(predictions, labels)
        count = which_count(y)
    else:
        z = objective.aligned(predictions, labels)
        z = z[:, None] if z.ndim == 1 else z
        mask = batch.predicting
        count = mask if mask is not None and mask.shape == z.shape[:-1] else z.new_ones(z.shape[:-1], dtype=torch.bool)
    return Predictions(z[:, None], count[:, None]) if z.ndim == 2 else Predictions(z, count)


def vectors_of(
    derivative: Derivative, made: Predictions, objective: Objective, labels: Tensor | None, size: int
) -> Iterator[tuple[int, Tensor]]:
    """Vectors of predictions (k, B, P, K), at most ``size`` at once, each with the fold it belongs to."""
    z, count = made
    places, outputs = z.shape[1:]
    rows = factor(objective, z, labels) if derivative.of == "curvature" else None
    for a in range(0, places * outputs, size):
        index = torch.arange(a, min(a + size, places * outputs), device=z.device)
        place, output = index // outputs, index % outputs
        v = z.new_zeros(len(index), *z.shape)
        each = torch.arange(len(index), device=z.device)
        if rows is None:
            v[each, :, place, output] = 1
        else:
            v[each, :, place] = rows[output, :, place]
        yield 0, v * count[..., None].to(v)


def pull_back(
    derivative: Derivative,
    places: Sequence[tuple[DerivativeCollector, Need, LayerCall]],
    made: Predictions,
    batch: Batch,
    objective: Objective,
) -> None:
    """Adds the vectors of one kind of derivative, pulled back to all layers that ask for it."""
    places = [place for place in places if place[2].traced.edge is not None]
    edges = [call.traced.edge for _, _, call in places if call.traced.edge is not None]
    held = sum(call.traced.value.nbytes for _, _, call in places) + made.z.nbytes
    pullback, first = Pullback(), True
    for fold, vectors in vectors_of(derivative, made, objective, batch.labels, max(1, CHUNK // (3 * held))):
        for (collector, need, call), found in zip(places, pullback(made.z, edges, vectors), strict=True):
            if found is not None:
                collector.add(need, call, fold, found, call.keep, first)
        first = False
