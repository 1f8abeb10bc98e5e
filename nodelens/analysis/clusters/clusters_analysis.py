"""The analysis ``clusters``: the units of each layer divided by their metrics, with types, stability and ablations."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import pandas as pd
from torch import nn

from nodelens.analysis.base import Analysis, AnalysisCall
from nodelens.engine.identity import identity
from nodelens.engine.saved_work import SavedWork, part
from nodelens.metrics import Metric, get_metric, list_metrics
from nodelens.results.files import plain
from nodelens.results.findings import Findings

from .epochs import follow_types
from .features import Features, distinct
from .metric_space import LOGARITHMS, ROLES, MetricSpaceClustering, Mode, UnitClusters, features_of, score_of
from .partition import means_by_cluster
from .stability import DRAWS, Stability, ablations, best_number, numbers_of_clusters, stability
from .unit_types import NONE, TYPES, mapping_of

AUTO = "auto"
Frames = dict[str, list[pd.DataFrame]]


@dataclass(frozen=True)
class ClustersAnalysis(Analysis):
    """Divides the units of each layer into clusters in the space of their metrics, and names the type of each cluster.

    n_clusters: number of clusters, or ``auto``: the number with the largest silhouette, from 4 where clusters are typed, else from
    2, to ``most``. columns: columns of the table of units; those that are names of metrics are measured. The types read three, in
    the order relevance, redundancy, synergy. log: columns of which the logarithm is taken. clustering_mode, score: ``geometric``,
    or a mode of ``MetricSpaceClustering.fit`` that reads the column of scores. draws: resamples for the stability; 0: none.
    ablations: whether clusters are found again with fewer columns. suffix: appended to the names of the columns of units, for a
    second analysis of this kind.

    Tables: ``clusters`` (one row per layer and cluster), ``layers``, ``ablations``, ``numbers`` (silhouette by number of clusters)
    and ``points`` (one row per unit). Columns of units: ``cluster`` (-1 without a value) and ``unit_type``. A layer that cannot be
    divided is listed with the reason in ``metadata["missing"]``, and the others are not affected.
    """

    n_clusters: int | Literal["auto"] = 4
    columns: str | Sequence[str] = ROLES
    log: Sequence[str] = LOGARITHMS
    clustering_mode: Mode = "geometric"
    score: str | None = None
    type_mapping_mode: str = "greedy"
    draws: int = DRAWS
    ablations: bool = True
    most: int = 8
    suffix: str = ""

    def __post_init__(self) -> None:
        mapping_of(self.type_mapping_mode)
        if self.n_clusters != AUTO:
            MetricSpaceClustering(self.n_clusters)  # type: ignore[arg-type]
        if self.clustering_mode not in get_args(Mode):
            raise ValueError(f"clusters: clustering_mode is {self.clustering_mode!r}; it is one of {', '.join(get_args(Mode))}")
        if (self.score is None) != (self.clustering_mode == "geometric"):
            way = "name a column, as score=taylor" if self.score is None else "leave score out, or choose another mode"
            raise ValueError(f"clusters: clustering_mode {self.clustering_mode!r} with score {self.score!r}: {way}")
        if self.draws < 0 or self.most < 2:
            raise ValueError(f"clusters: draws is {self.draws} and most {self.most}; they are 0 or more, and 2 or more")

    def required_metrics(self) -> dict[str, Metric]:
        """The metrics that columns and score name."""
        names = [*_names(self.columns), *([self.score] if self.score else [])]
        return {name: get_metric(name) for name in names if name in list_metrics()}

    def run(self, model: nn.Module, data: Iterable[Any], call: AnalysisCall) -> Findings:
        """Reads the columns of the result, and no data. A layer that cannot be divided is listed as missing."""
        table, seed = call.measured.units, call.seed
        frames: Frames = {name: [] for name in ("clusters", "layers", "ablations", "numbers", "points")}
        missing = []
        labels = pd.DataFrame({"cluster": -1, "unit_type": NONE}, index=table.index)
        for layer, units in table.groupby(level="layer", sort=False):
            try:
                features = features_of(units, _names(self.columns), str(layer), self.log)
                found = self._of_layer(features, units, call, frames)
            except ValueError as error:  # the other layers go on
                missing.append({"layer": str(layer), "what": "clusters", "reason": str(error)})
                continue
            labels.loc[units.index, "cluster"] = found.labels
            labels.loc[units.index, "unit_type"] = found.types
            frames["points"].append(_points(found, features, units.index))
        tables = {name: pd.concat(parts) if parts else pd.DataFrame() for name, parts in frames.items()}
        about = {"options": plain(vars(self)), "seed": seed, "missing": missing}
        return Findings("clusters", tables, _lines(tables, missing), labels.add_suffix(self.suffix), metadata=about)

    def over_epochs(self, found: Mapping[int, Findings]) -> Findings:
        """How the clusters change during training, from what was found after each epoch."""
        return follow_types(found)

    def _of_layer(self, features: Features, units: pd.DataFrame, call: AnalysisCall, frames: Frames) -> UnitClusters:
        """The clusters of a layer; adds its rows to the tables."""
        scores = score_of(units, self.score, features.layer)
        typed = MetricSpaceClustering.typed(features.names, scores)
        base = MetricSpaceClustering(len(TYPES) if typed else 2, call.seed, self.type_mapping_mode)
        numbers = numbers_of_clusters(base, features, range(2, self.most + 1))
        best = best_number(numbers, base.n_clusters) or base.n_clusters
        chosen = best if self.n_clusters == AUTO else int(self.n_clusters)
        clustering = replace(base, n_clusters=chosen)
        found = clustering.fit_features(features, scores, self.clustering_mode)
        frames["clusters"].append(_clusters(found, features))
        frames["layers"].append(self._layer_row(clustering, found, features, scores, call.saved))
        frames["numbers"].append(_of(features.layer, numbers.reset_index()))
        if self.ablations and len(features.names) > 1 and distinct(features.standardized()) >= chosen:
            frames["ablations"].append(_of(features.layer, ablations(clustering, features).reset_index()))
        return found

    def _layer_row(
        self, clustering: MetricSpaceClustering, found: UnitClusters, features: Features, scores: Any, saved: SavedWork | None
    ) -> pd.DataFrame:
        row: dict[str, Any] = {
            "units": len(found.labels),
            "without_value": int((found.labels < 0).sum()),
            "n_clusters": found.n_clusters,
            "silhouette": found.silhouette,
        }
        if self.draws:
            options = features, scores, self.clustering_mode, self.draws
            read = identity([features.names, features.values, scores])
            name = f"stability, {found.layer_name}, {clustering}, {read}"
            sure = Stability(**part(saved, name, lambda: stability(clustering, *options)._asdict()))
            row |= {"stability": sure.mean, "stability_low": sure.low, "stability_high": sure.high, "draws": sure.draws}
        row |= {kind: found.type_counts[kind] for kind in TYPES}
        return pd.DataFrame(row, index=pd.Index([found.layer_name], name="layer"))


def _names(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _clusters(found: UnitClusters, features: Features) -> pd.DataFrame:
    """One row per cluster: type, size, mean of each feature and its centroid in standard deviations."""
    live = found.labels >= 0
    means = means_by_cluster(features.values[live], found.labels[live], found.n_clusters)
    table = pd.DataFrame({"cluster": range(found.n_clusters), "type": list(found.type_mapping.values()), "units": found.sizes})
    table["share"] = found.sizes / live.sum()
    for k, name in enumerate(features.names):
        table[name] = means[:, k]
    for k, name in enumerate(found.columns):
        table[f"z_{name}"] = found.centroids[:, k]
    return _of(found.layer_name, table)


def _points(found: UnitClusters, features: Features, index: pd.Index) -> pd.DataFrame:
    """One row per unit: its features, cluster and type."""
    table = pd.DataFrame(features.values, columns=list(features.names), index=index)
    return table.assign(cluster=found.labels, type=found.types)


def _of(layer: str, table: pd.DataFrame) -> pd.DataFrame:
    table.insert(0, "layer", layer)
    return table


def _lines(tables: dict[str, pd.DataFrame], missing: list[dict[str, str]]) -> list[str]:
    """The findings in words."""
    lines, layers, clusters = [], tables["layers"], tables["clusters"]
    if len(layers):
        sizes = clusters.groupby("type", sort=False)["units"].sum()
        told = ", ".join(f"{n} {kind}" for kind, n in sizes.items() if kind != NONE) or "without types"
        lines.append(f"{int(layers['units'].sum()):,} units in {len(layers)} layer{'s' * (len(layers) != 1)}: {told}")
        sure = "stability" in layers and f", stability {layers['stability'].median():.2f} (adjusted Rand index, bootstrap)"
        lines.append(f"silhouette {layers['silhouette'].median():.2f}{sure or ''}, medians over layers")
    if len(tables["ablations"]):
        mean = tables["ablations"].groupby("features", sort=False)["ari"].mean().iloc[1:]
        lines.append("agreement with fewer features: " + ", ".join(f"{name} {ari:.2f}" for name, ari in mean.items()))
    return lines + [f"{each['layer']} is left out: {each['reason']}" for each in missing]
