"""Louvain's method on dense modularity matrices: single moves, aggregation of modules to units, and exchanges at the end."""

import numpy as np

from .graph import one_hot, quality
from .moves import Partition, move_locally, refine

DISTURBED = 0.25  # share of the units that a disturbance puts into random modules


def louvain_matrix(matrix: np.ndarray, starts: int, rng: np.random.Generator) -> np.ndarray:
    """The best labels of several seeded starts, and of as many disturbances of the best, (units,).

    matrix: modularity matrix, (units, units), of any null model

    A disturbance puts a quarter of the units into random modules, and moves on from there: it reaches better partitions than a
    further start, in less time (iterated local search, Lourenço, Martin & Stützle 2003).
    """
    found = [_polished(matrix, agglomerate(matrix, np.arange(len(matrix)), rng), rng) for _ in range(starts)]
    scores = [quality(matrix, labels) for labels in found]
    best = int(np.argmax(scores))
    labels, score = found[best], scores[best]
    for _ in range(starts):
        trial = labels.copy()
        drawn = rng.random(len(trial)) < DISTURBED
        trial[drawn] = rng.integers(0, trial.max() + 1, int(drawn.sum()))
        trial = _polished(matrix, trial, rng)
        if (reached := quality(matrix, trial)) > score:
            labels, score = trial, reached
    return labels


def _polished(matrix: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moves and exchanges of units, and mergers of modules, until the number of modules no longer falls."""
    while True:
        state = Partition(matrix, labels)
        move_locally(state, rng)
        refine(state)
        labels = agglomerate(matrix, state.labels, rng)
        if labels.max() == state.labels.max():
            return labels


def agglomerate(matrix: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moves whole modules, then modules of modules, until no move helps (Blondel et al. 2008)."""
    while True:
        chosen = one_hot(labels) if labels.max() + 1 < len(labels) else None
        state = Partition(matrix if chosen is None else chosen.T @ matrix @ chosen, np.arange(labels.max() + 1))
        if not move_locally(state, rng):
            return labels
        labels = state.labels[labels]
