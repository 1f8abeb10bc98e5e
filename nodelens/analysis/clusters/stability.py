"""How far clusters can be trusted: bootstrap over units, other numbers of clusters, fewer features."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

from .features import Features, Scale, distinct
from .metric_space import MetricSpaceClustering, Mode
from .partition import silhouette

DRAWS = 50


class Stability(NamedTuple):
    """Mean adjusted Rand index of the clusters with those of resampled units, and the interval that holds 95 % of the draws."""

    mean: float
    low: float
    high: float
    draws: int  # resamples with enough different units


def stability(
    clustering: MetricSpaceClustering,
    features: Features,
    scores: Any = None,
    mode: Mode = "geometric",
    draws: int = DRAWS,
    level: float = 0.95,
) -> Stability:
    """Whether the same clusters are found when the units of the layer are drawn again with replacement.

    Each draw finds the clusters of as many units, drawn with replacement, assigns all units of the layer to them, and compares
    this division with the one of the layer itself: 1 for the same clusters, about 0 for unrelated ones. Draws with fewer different
    units than clusters are left out. NaN without a draw.

    Source: Hennig 2007, Computational Statistics & Data Analysis 52:258, section 3; the index: Hubert & Arabie 1985
    """
    if draws < 1 or not 0 < level < 1:
        raise ValueError(f"draws is {draws} and level {level}: give at least 1 draw, and a level between 0 and 1")
    used, _ = clustering.inputs(features, scores, mode)
    values = used.values[used.live]
    own = clustering.partition(used, mode)(values)
    chance = np.random.default_rng(clustering.seed)
    found = []
    for _ in range(draws):
        drawn = values[chance.integers(len(values), size=len(values))]
        if distinct(Scale.of(drawn)(drawn)) >= clustering.n_clusters:
            rule = clustering.partition(replace(used, values=drawn), mode)
            found.append(adjusted_rand_score(own, rule(values)))
    if not found:
        return Stability(np.nan, np.nan, np.nan, 0)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Stability(float(np.mean(found)), float(low), float(high), len(found))


def numbers_of_clusters(clustering: MetricSpaceClustering, features: Features, numbers: Iterable[int]) -> pd.DataFrame:
    """The silhouette for each number of clusters, index ``n_clusters``.

    Numbers that exceed the different units of the layer are left out.
    """
    points, values = features.standardized(), features.values[features.live]
    rows = []
    for k in numbers:
        if 2 <= k <= distinct(points):
            found = replace(clustering, n_clusters=k).partition(features)(values)
            rows.append((k, silhouette(points, found, clustering.seed)))
    return pd.DataFrame(rows, columns=["n_clusters", "silhouette"]).set_index("n_clusters")


def best_number(table: pd.DataFrame, least: int = 2) -> int | None:
    """The number of clusters with the largest silhouette (Rousseeuw 1987), ``least`` or more; None where there is none."""
    known = table["silhouette"].dropna()
    known = known[known.index >= least]
    return None if known.empty else int(known.idxmax())


def ablations(clustering: MetricSpaceClustering, features: Features) -> pd.DataFrame:
    """The clusters found with fewer features, compared with those of all: one row per set of features.

    Columns: features, silhouette, and agreement with all of them as adjusted Rand index ``ari`` and adjusted mutual information
    ``ami`` (Vinh et al. 2010); both are 1 for the same clusters and 0 on average for unrelated ones. The units are those that have
    all features. A set that does not tell enough units apart has NaN.
    """
    whole = replace(features, values=features.values[features.live])
    own = clustering.partition(whole)(whole.values)
    rows = []
    for names in _subsets(features.names):
        some = whole.only(names)
        row: dict[str, Any] = {"features": "+".join(names), "silhouette": np.nan, "ari": np.nan, "ami": np.nan}
        if distinct(some.standardized()) >= clustering.n_clusters:
            found = clustering.partition(some)(some.values)
            row["silhouette"] = silhouette(some.standardized(), found, clustering.seed)
            row |= {"ari": adjusted_rand_score(own, found), "ami": adjusted_mutual_info_score(own, found)}
        rows.append(row)
    return pd.DataFrame(rows).set_index("features")


def _subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """All features, then all but one, then single ones."""
    without = [tuple(name for name in names if name != gone) for gone in reversed(names)] if len(names) > 2 else []
    return [names, *without, *([(name,) for name in names] if len(names) > 1 else [])]
