"""Louvain's method on dense modularity matrices: single moves, aggregation of modules to units, and exchanges at the end."""

import numpy as np

from .moves import TOLERANCE, Partition, move_locally, refine

DISTURBED = 0.25  # share of the units that a disturbance puts into random modules
ITERATIONS = 30  # towards the eigenvector that splits a module


def louvain_matrix(matrix: np.ndarray, starts: int, rng: np.random.Generator) -> np.ndarray:
    """The best labels of several seeded starts, and of as many disturbances of the best, (units,).

    matrix: modularity matrix, (units, units), of any null model

    A disturbance puts a quarter of the units into random modules, and moves on from there: it reaches better partitions than a
    further start, in less time (iterated local search, Lourenço, Martin & Stützle 2003).
    """
    found = [_polished(matrix, agglomerate(matrix, rng), rng) for _ in range(starts)]
    labels, score = max(found, key=lambda each: each[1])
    for _ in range(starts):
        trial = labels.copy()
        drawn = rng.random(len(trial)) < DISTURBED
        trial[drawn] = rng.integers(0, trial.max() + 1, int(drawn.sum()))
        trial, reached = _polished(matrix, trial, rng)
        if reached > score:
            labels, score = trial, reached
    parts = _split(matrix, labels, rng)
    return labels if parts.max() == labels.max() else _polished(matrix, parts, rng)[0]


def _polished(matrix: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Labels after moves and exchanges of units, and mergers of modules, until the number of modules no longer falls; their Q."""
    while True:
        state = Partition(matrix, labels)
        move_locally(state, rng)
        refine(state)
        merged = agglomerate(state.between, rng)
        if merged.max() == state.labels.max():
            return state.labels, float(state.between.trace())
        labels = merged[state.labels]


def _split(matrix: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Splits the modules that are better in two: two that were merged early are never parted by moves of single units.

    The parts are the signs of about the leading eigenvector of B_g - diag(B_g 1), from a few steps of power iteration; a split is
    made where its exact gain is positive. Source: Newman 2006, PNAS 103:8577.
    """
    labels = labels.copy()
    for module in range(int(labels.max()) + 1):
        members = np.flatnonzero(labels == module)
        inner = matrix[np.ix_(members, members)]
        shifted = inner - np.diag(inner.sum(1))
        shifted += np.eye(len(inner)) * (2 * np.linalg.norm(shifted) / len(inner) ** 0.5)  # the least eigenvalue is not the largest
        vector = rng.standard_normal(len(inner))
        for _ in range(ITERATIONS):
            vector = shifted @ vector
            vector /= np.linalg.norm(vector) or 1.0
        part = vector < 0
        if -inner[part][:, ~part].sum() > TOLERANCE:
            labels[members[part]] = labels.max() + 1
    return labels


def agglomerate(matrix: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moves single units, each first a module of its own, then whole modules, until no move helps (Blondel et al. 2008)."""
    labels = np.arange(len(matrix))
    while True:
        state = Partition(matrix, np.arange(len(matrix)))
        if not move_locally(state, rng):
            return labels
        labels, matrix = state.labels[labels], state.between
