"""Clusters of the units of a layer in the space of Rayleigh quotient, redundancy and synergy, and their types."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from nodelens.messages import as_seed

from .features import Features, as_column
from .partition import ClusterRule, NearestCentroid, ScoreQuantiles, means_by_cluster, silhouette
from .unit_types import NONE, TYPES, mapping_of, types_by_centroid, types_by_score

Mode = Literal["geometric", "score_augmented", "importance_reassign", "quantile"]
ROLES = ("rq", "redundancy", "synergy")  # what the columns of the geometric types are, in this order
LOGARITHMS = ("rq", "rayleigh_quotient")  # columns of which the logarithm is taken
SCORE = "score"
ABLATIONS = {
    "all": ROLES,
    "rq_red": ("rq", "redundancy"),
    "rq_syn": ("rq", "synergy"),
    "red_syn": ("redundancy", "synergy"),
    "rq_only": ("rq",),
    "red_only": ("redundancy",),
    "syn_only": ("synergy",),
}


@dataclass(frozen=True, eq=False)
class UnitClusters:
    """The clusters of the units of one layer.

    layer_name: the layer. columns: names of the features. labels: the cluster of each unit, (units,) int64, -1 for a unit without
    a value. types: the type of each unit, (units,) strings, ``none`` without a value. centroids: mean of each cluster in
    standardized features, (clusters, columns). silhouette: mean over units, in [-1, 1]; NaN where each unit is a cluster.
    type_mapping: the type of each cluster. Clusters are numbered by type, then by size.
    """

    layer_name: str
    columns: tuple[str, ...]
    labels: np.ndarray
    types: np.ndarray
    centroids: np.ndarray
    silhouette: float
    type_mapping: dict[int, str]

    @property
    def n_clusters(self) -> int:
        """The number of clusters."""
        return len(self.centroids)

    @property
    def sizes(self) -> np.ndarray:
        """The number of units of each cluster, (clusters,)."""
        return np.bincount(self.labels[self.labels >= 0], minlength=self.n_clusters)

    @property
    def type_counts(self) -> dict[str, int]:
        """The number of units of each type; ``none`` only where there are some."""
        counts = {kind: int((self.types == kind).sum()) for kind in (*TYPES, NONE)}
        return {kind: n for kind, n in counts.items() if n or kind != NONE}


@dataclass(frozen=True)
class MetricSpaceClustering:
    """Divides the units of a layer into clusters by k-means on ln(rq), redundancy and synergy, and names the type of each.

    n_clusters: number of clusters, at least 4 where they are typed. seed: of the starts of k-means. type_mapping_mode: how the
    types are found from the centroids: greedy, global_penalized, global_simple or global_prototype (see ``types_by_centroid``).

    >>> rq, redundancy, synergy = [9, 8, 1, 1, 1, 1, 0.1, 0.2], [0, 0, 2, 2.1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1.1, 0, 0]
    >>> print(*MetricSpaceClustering().fit(rq, redundancy, synergy, layer_name="conv1").types)
    critical critical redundant redundant synergistic synergistic background background

    Raises ValueError for an unknown mapping, a negative seed, or fewer than two clusters.
    """

    n_clusters: int = 4
    seed: int = 42
    type_mapping_mode: str = "greedy"

    def __post_init__(self) -> None:
        mapping_of(self.type_mapping_mode)
        object.__setattr__(self, "seed", as_seed(self.seed))
        if isinstance(self.n_clusters, bool) or not isinstance(self.n_clusters, int) or self.n_clusters < 2:
            raise ValueError(f"n_clusters is {self.n_clusters!r}; it is a whole number, 2 or more")

    def fit(
        self,
        rq: Any,
        redundancy: Any,
        synergy: Any,
        layer_name: str = "layer",
        *,
        ablation: str = "all",
        importance_scores: Any = None,
        clustering_mode: Mode = "geometric",
    ) -> UnitClusters:
        """Clusters of one layer, from one value of each metric per unit.

        rq, redundancy, synergy: (units,) each, arrays, lists, series or tensors. A unit with a value that is not finite is in no
        cluster. Rayleigh quotients below 1e-10 count as 1e-10.
        ablation: which metrics are used: all, rq_red, rq_syn, red_syn, rq_only, red_only or syn_only.
        clustering_mode: ``geometric`` names the types by the centroids. The other modes need importance_scores (units,):
        ``importance_reassign`` names them by the clusters' mean scores (critical > synergistic > redundant > background),
        ``score_augmented`` does so and clusters by the score as well, ``quantile`` divides the scores at their quantiles.

        Raises ValueError, with the layer, for fewer different units than clusters, fewer than four clusters, columns that do not
        fit each other, and a missing score.
        """
        if ablation not in ABLATIONS:
            raise ValueError(f"ablation is {ablation!r}; it is one of {', '.join(ABLATIONS)}")
        columns = dict(zip(ROLES, (rq, redundancy, synergy), strict=True))
        features = Features.of(layer_name, columns, log=("rq",)).only(ABLATIONS[ablation])
        return self.fit_features(features, importance_scores, clustering_mode)

    def fit_columns(
        self,
        units: pd.DataFrame,
        columns: Sequence[str] = ROLES,
        layer_name: str = "layer",
        *,
        log: Iterable[str] = LOGARITHMS,
        score: str | None = None,
        clustering_mode: Mode = "geometric",
    ) -> UnitClusters:
        """Clusters of one layer from columns of a table of its units, such as ``result.units.loc["conv1"]``.

        columns: any columns of numbers. The types by centroids read three, in the order relevance, redundancy, synergy; with
        another number of columns, clusters are numbered and their type is ``none``, unless a score names it. log: columns of
        which the logarithm is taken. score: the column of scores, for the other modes.
        """
        return self.fit_features(features_of(units, columns, layer_name, log), score_of(units, score, layer_name), clustering_mode)

    def fit_features(self, features: Features, scores: Any = None, mode: Mode = "geometric") -> UnitClusters:
        """Clusters from features, as ``fit``."""
        features, scores = self.inputs(features, scores, mode)
        if self.n_clusters < len(TYPES) and self.typed(features.names, scores):
            raise ValueError(
                f"layer {features.layer!r}: {self.n_clusters} clusters cannot have the four types {', '.join(TYPES)}: "
                "set n_clusters to 4 or more"
            )
        rule = self.partition(features, mode)
        live, points = features.live, features.standardized()
        found = rule(features.values[live])
        if len(np.unique(found)) < self.n_clusters:
            raise ValueError(
                f"layer {features.layer!r}: {self.n_clusters} clusters were asked for and only {len(np.unique(found))} have units, "
                "because many scores are equal: lower n_clusters, or choose another score"
            )
        geometry = points if mode != "quantile" else points[:, :-1]  # the score divides the units, it is no feature
        columns = features.names if mode != "quantile" else features.names[:-1]
        centroids = means_by_cluster(geometry, found, self.n_clusters)
        kinds = self._types(
            columns, centroids, None if scores is None else means_by_cluster(scores[live, None], found, self.n_clusters)
        )
        order = _order(kinds, np.bincount(found), centroids)
        labels = np.full(len(live), -1)
        labels[live] = np.argsort(order)[found]
        kinds = [kinds[k] for k in order]
        types = np.array([*kinds, NONE], dtype=object)[labels]
        return UnitClusters(
            features.layer,
            columns,
            labels,
            types,
            centroids[order],
            silhouette(geometry, found, self.seed),
            dict(enumerate(kinds)),
        )

    def inputs(self, features: Features, scores: Any, mode: Mode) -> tuple[Features, np.ndarray | None]:
        """The features that a mode clusters by, with the score as the last one where it takes part, and the scores.

        Raises ValueError for a mode that needs scores without them, or scores without such a mode.
        """
        if mode not in get_args(Mode):
            raise ValueError(f"clustering_mode is {mode!r}; it is one of {', '.join(get_args(Mode))}")
        if (mode == "geometric") != (scores is None):
            words = (
                "needs no scores: leave them out" if mode == "geometric" else "needs scores, one per unit: give importance_scores"
            )
            raise ValueError(f"layer {features.layer!r}: clustering_mode {mode!r} {words}, or choose another mode")
        if scores is not None:
            scores = as_column(features.layer, SCORE, scores)
            if len(scores) != len(features.values):
                raise ValueError(
                    f"layer {features.layer!r} has {len(features.values)} units and {len(scores)} scores: give one per unit"
                )
            if mode == "importance_reassign":  # the score names the types only
                without = ~np.isfinite(scores)
                values = np.where(without[:, None], np.nan, features.values)
                features = Features(features.layer, features.names, values)
            else:
                features = features.with_column(SCORE, scores)
        features.check(self.n_clusters)
        return features, scores

    def partition(self, features: Features, mode: Mode = "geometric") -> ClusterRule:
        """The rule that divides the units; the features are those of ``inputs``."""
        rule = ScoreQuantiles if mode == "quantile" else NearestCentroid
        return rule.of(features.values[features.live], self.n_clusters, self.seed)

    @staticmethod
    def typed(columns: Sequence[str], scores: Any) -> bool:
        """Whether clusters have types: by scores, by three columns, or by some of the three metrics."""
        return scores is not None or len(columns) == len(ROLES) or set(columns) <= set(ROLES)

    def _types(self, columns: tuple[str, ...], centroids: np.ndarray, scores: np.ndarray | None) -> list[str]:
        if scores is not None:
            return types_by_score(scores[:, 0])
        if not self.typed(columns, scores):
            return [NONE] * len(centroids)
        every = centroids
        if set(columns) <= set(ROLES):  # a metric that is left out is at its mean in every cluster
            every = np.zeros((len(centroids), len(ROLES)))
            every[:, [ROLES.index(name) for name in columns]] = centroids
        return types_by_centroid(every, mapping_of(self.type_mapping_mode))


def features_of(units: pd.DataFrame, columns: Sequence[str], layer: str, log: Iterable[str] = LOGARITHMS) -> Features:
    """Features from columns of a table of units. Raises ValueError for a missing column."""
    columns = [columns] if isinstance(columns, str) else list(columns)
    _check_columns(units, columns, layer)
    return Features.of(layer, {name: units[name] for name in columns}, log)


def score_of(units: pd.DataFrame, score: str | None, layer: str) -> np.ndarray | None:
    """The column of scores, None without one. Raises ValueError for a missing column."""
    if score is None:
        return None
    _check_columns(units, [score], layer)
    return as_column(layer, score, units[score])


def _check_columns(units: pd.DataFrame, columns: Sequence[str], layer: str) -> None:
    missing = [name for name in columns if name not in units]
    if missing:
        there = ", ".join(str(c) for c in units.select_dtypes("number")) or "no column of numbers"
        raise ValueError(f"layer {layer!r} has no column {', '.join(missing)}: measure it, or name others; the table has {there}")


def _order(kinds: Sequence[str], sizes: np.ndarray, centroids: np.ndarray) -> list[int]:
    """Clusters by type, then by size, then by centroid: numbers that do not depend on the starts of k-means."""
    rank = {kind: k for k, kind in enumerate((*TYPES, NONE))}
    return sorted(range(len(kinds)), key=lambda k: (rank[kinds[k]], -int(sizes[k]), tuple(centroids[k])))
