"""Rules that divide units into clusters: k-means in the space of their features, and quantiles of a score."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score

from .features import Scale

STARTS = 10  # of k-means; the best is kept
WIDEST = 4096  # units: the silhouette of a wider layer is that of a seeded sample, because it compares all pairs


class ClusterRule(Protocol):
    """Says which cluster each row of values belongs to."""

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """(rows, columns) -> (rows,) int64."""
        ...


@dataclass(frozen=True, eq=False)
class NearestCentroid:
    """The centroids that k-means found, in standardized features."""

    scale: Scale
    centroids: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, clusters: int, seed: int) -> "NearestCentroid":
        """Lloyd's k-means on z-scores (ddof 0), the best of ten starts. The order of the rows does not matter."""
        scale = Scale.of(values)
        points = scale(values)
        points = points[np.lexsort(points.T)]  # the starts are drawn by row number
        found = KMeans(clusters, n_init=STARTS, random_state=seed % 2**32).fit(points)
        return cls(scale, found.cluster_centers_)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        points = self.scale(values)
        squares = (points**2).sum(1)[:, None] + (self.centroids**2).sum(1) - 2 * points @ self.centroids.T
        return squares.argmin(1)


@dataclass(frozen=True, eq=False)
class ScoreQuantiles:
    """Clusters by the quantiles of a score, which is the last column; the cluster of the largest scores is the last."""

    edges: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, clusters: int, seed: int) -> "ScoreQuantiles":
        return cls(np.quantile(values[:, -1], np.arange(1, clusters) / clusters))

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.edges, values[:, -1], side="right")


def silhouette(points: np.ndarray, labels: np.ndarray, seed: int = 0) -> float:
    """Mean silhouette of standardized points; NaN for one cluster, or where each point is a cluster. (Rousseeuw 1987)."""
    if not 2 <= len(np.unique(labels)) < len(points):
        return float("nan")
    if len(points) <= WIDEST:
        return float(silhouette_score(points, labels))
    drawn = np.random.default_rng(seed).choice(len(points), WIDEST, replace=False)
    return float(silhouette_score(points[drawn], labels[drawn])) if len(np.unique(labels[drawn])) > 1 else float("nan")


def means_by_cluster(values: np.ndarray, labels: np.ndarray, clusters: int) -> np.ndarray:
    """The mean of each cluster, (clusters, columns); NaN for an empty one."""
    sizes = np.bincount(labels, minlength=clusters)
    totals = np.stack([np.bincount(labels, column, minlength=clusters) for column in values.T], 1)
    return totals / np.where(sizes, sizes, np.nan)[:, None]
