"""Spectral bisection: modules split in two by the leading eigenvector of their modularity matrix."""

import numpy as np
from scipy.linalg import eigh

from .graph import quality
from .moves import TOLERANCE, Partition, refine


def spectral_matrix(matrix: np.ndarray) -> np.ndarray:
    """Labels from repeated bisection of a modularity matrix, (units,). Nothing in it is drawn at random.

    A module g is split by the signs of the eigenvector with the largest algebraic eigenvalue of B_g - diag(B_g 1), and exchanges of
    single units refine the split, until no split increases Q. Source: Newman 2006, PNAS 103:8577.
    """
    labels, open_modules = np.zeros(len(matrix), np.int64), [0]
    while open_modules:
        members = np.flatnonzero(labels == open_modules.pop())
        parts = _split(matrix[np.ix_(members, members)])
        if parts.max() > 0:
            renamed = np.concatenate([labels[members[:1]], labels.max() + np.arange(1, parts.max() + 1)])
            labels[members] = renamed[parts]
            open_modules += renamed.tolist()
    state = Partition(matrix, labels)
    refine(state)
    return state.labels


def _split(inner: np.ndarray) -> np.ndarray:
    """Labels of the parts of one module; all 0 where no split is better."""
    whole = np.zeros(len(inner), np.int64)
    if len(inner) < 2:
        return whole
    last = len(inner) - 1
    values, vectors = eigh(inner - np.diag(inner.sum(1)), subset_by_index=[last, last])
    if values[0] <= TOLERANCE:
        return whole
    state = Partition(inner, (vectors[:, 0] < 0).astype(np.int64))
    refine(state)
    return state.labels if quality(inner, state.labels) > inner.sum() + TOLERANCE else whole
