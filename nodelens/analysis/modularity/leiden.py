"""The Leiden algorithm, from the package leidenalg."""

import numpy as np

from .graph import modularity_matrix, quality


def leiden_labels(weights: np.ndarray, gamma: float, starts: int, rng: np.random.Generator) -> np.ndarray:
    """The best labels of several seeded starts, (units,). Source: Traag, Waltman & van Eck 2019, Sci. Rep. 9:5233.

    Raises ValueError where leidenalg is not installed.
    """
    try:
        import igraph
        import leidenalg
    except ImportError:
        raise ValueError("method=leiden needs the package leidenalg: pip install leidenalg, or take method=louvain") from None
    graph = igraph.Graph.Weighted_Adjacency(weights.tolist(), mode="undirected", loops=False)
    kind, matrix = leidenalg.RBConfigurationVertexPartition, modularity_matrix(weights, gamma)
    best, score = np.zeros(len(weights), np.int64), -np.inf
    for seed in rng.integers(0, 2**31 - 1, starts):
        options = {"weights": "weight", "resolution_parameter": gamma, "seed": int(seed), "n_iterations": -1}
        labels = np.array(leidenalg.find_partition(graph, kind, **options).membership, np.int64)
        if (reached := quality(matrix, labels)) > score:
            best, score = labels, reached
    return best
