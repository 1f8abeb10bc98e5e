"""The graph of a layer as a picture: units in order of their modules."""

import numpy as np

from .layer_modules import LayerModules

WIDEST = 256  # cells of a picture; a wider graph is averaged over blocks of units


def sorted_matrix(found: LayerModules) -> np.ndarray:
    """Weights between live units, largest module first, (cells, cells) float32: one cell per unit, or means over blocks."""
    labels = found.modules.labels[found.graph.live]
    sizes = np.bincount(labels)
    order = np.lexsort((np.arange(len(labels)), labels, -sizes[labels]))
    weights = found.graph.weights[np.ix_(order, order)]
    cells = np.arange(len(order)) * min(len(order), WIDEST) // len(order)
    starts = np.flatnonzero(np.diff(cells, prepend=-1))
    counts = np.diff(starts, append=len(order))
    sums = np.add.reduceat(np.add.reduceat(weights, starts, 0), starts, 1)
    return (sums / np.outer(counts, counts)).astype(np.float32)
