"""The type of each cluster of units: critical, redundant, synergistic or background."""

from typing import Literal, get_args

import numpy as np
from scipy.optimize import linear_sum_assignment

Mapping = Literal["greedy", "global_penalized", "global_simple", "global_prototype"]
TYPES = ("critical", "redundant", "synergistic", "background")
BY_SCORE = ("critical", "synergistic", "redundant", "background")  # from the highest mean score to the lowest
NONE = "none"  # the type of units without a value, and of clusters that cannot be typed
_ALIASES = {
    "global": "global_penalized",
    "global_permutation": "global_penalized",
    "simple": "global_simple",
    "prototype": "global_prototype",
}
_PROTOTYPES = np.array([[1, -1, 0], [0, 1, -1], [0, -1, 1], [-1, -1, -1]], dtype=float)


def mapping_of(name: str) -> Mapping:
    """A mapping by its name or alias. Raises ValueError for an unknown one."""
    found = _ALIASES.get(name, name)
    if found not in get_args(Mapping):
        raise ValueError(f"type_mapping_mode is {name!r}; it is one of {', '.join(get_args(Mapping))}")
    return found  # type: ignore[return-value]


def types_by_centroid(centroids: np.ndarray, mapping: Mapping) -> list[str]:
    """The type of each cluster from its centroid in standardized (ln rq, redundancy, synergy), (4 or more, 3).

    ``greedy``: critical has the largest r - d, redundant the largest d of the rest, synergistic the largest s of the rest. The
    global mappings assign the four types to four clusters so that the total of their scores is largest; all other clusters are
    background.
    """
    if mapping == "greedy":
        return _greedy(centroids)
    clusters, types = linear_sum_assignment(_scores(centroids, mapping), maximize=True)
    found = ["background"] * len(centroids)
    for cluster, kind in zip(clusters, types, strict=True):
        found[cluster] = TYPES[kind]
    return found


def types_by_score(means: np.ndarray) -> list[str]:
    """The type of each cluster from the mean score of its units, (clusters,): critical > synergistic > redundant > background."""
    ranks = np.argsort(np.argsort(-np.asarray(means), kind="stable"))
    return [BY_SCORE[min(rank, len(BY_SCORE) - 1)] for rank in ranks]


def _greedy(centroids: np.ndarray) -> list[str]:
    r, d, s = centroids.T
    found = ["background"] * len(centroids)
    rest = np.ones(len(centroids), dtype=bool)
    for kind, score in zip(TYPES, (r - d, d, s), strict=False):
        best = int(np.argmax(np.where(rest, score, -np.inf)))
        found[best], rest[best] = kind, False
    return found


def _scores(centroids: np.ndarray, mapping: Mapping) -> np.ndarray:
    """How well each cluster fits each type, (clusters, 4)."""
    r, d, s = centroids.T
    if mapping == "global_prototype":
        lengths = np.linalg.norm(centroids, axis=1, keepdims=True) * np.linalg.norm(_PROTOTYPES, axis=1)
        return centroids @ _PROTOTYPES.T / np.where(lengths > 0, lengths, 1.0)
    background = -np.abs(centroids).sum(1)
    if mapping == "global_simple":
        return np.stack([r - d, d, s, background], 1)
    return np.stack([r - d, d - 0.25 * r, s - 0.25 * d, background], 1)
