"""Clusters over training: which types the units have after each epoch, and how many keep theirs."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import pandas as pd
from sklearn.metrics import adjusted_rand_score

from nodelens.results.findings import Findings

from .unit_types import NONE


def follow_types(found: Mapping[int, Findings]) -> Findings:
    """Follows the clusters of units from epoch to epoch.

    found: {epoch: what ``ClustersAnalysis`` found after it}

    Returns the tables ``types`` (share of the units of each layer by epoch and type, or by cluster where clusters have no type),
    ``stability`` (of two consecutive epochs: the adjusted Rand index of the clusters, and the share of units that keep their type,
    NaN without types; units without a value in one of them do not count), ``layers`` (silhouette and stability by epoch) and
    ``labels`` (cluster and type of each unit after each epoch).
    """
    epochs = sorted(epoch for epoch in found if len(found[epoch]["points"]))
    points = {epoch: found[epoch]["points"][["cluster", "type"]] for epoch in epochs}
    typed = any((table["type"] != NONE).any() for table in points.values())
    labels = pd.concat(points, names=["epoch"]).reset_index() if points else pd.DataFrame()
    layers = pd.concat({epoch: found[epoch]["layers"] for epoch in epochs}, names=["epoch"]).reset_index() if points else labels
    stability = pd.DataFrame([row for pair in pairwise(epochs) for row in _between(points, pair, typed)], columns=_COLUMNS)
    frames = {"types": _shares(labels, typed), "stability": stability, "layers": layers, "labels": labels}
    return Findings("clusters_epochs", frames, _lines(stability, typed), metadata={"epochs": epochs, "typed": typed})


def _between(points: Mapping[int, pd.DataFrame], pair: tuple[int, int], typed: bool) -> Iterator[dict[str, Any]]:
    first, second = (points[epoch] for epoch in pair)
    both = first.add_suffix("_a").join(second.add_suffix("_b"), how="inner")
    both = both[(both["cluster_a"] >= 0) & (both["cluster_b"] >= 0)]
    for layer, rows in both.groupby(level="layer", sort=False):
        same = float((rows["type_a"] == rows["type_b"]).mean()) if typed else float("nan")
        ari = float(adjusted_rand_score(rows["cluster_a"], rows["cluster_b"]))
        yield dict(zip(_COLUMNS, (layer, *pair, len(rows), ari, same), strict=True))


def _shares(labels: pd.DataFrame, typed: bool) -> pd.DataFrame:
    """Share of the units of each layer and epoch by type or cluster; 0 where a type has none."""
    if not len(labels):
        return pd.DataFrame()
    by = "type" if typed else "cluster"
    counts = labels.groupby(["epoch", "layer", by], sort=False).size().unstack(by, fill_value=0)
    shares = counts.div(counts.sum(axis=1), axis=0).stack().rename("share").reset_index()
    return shares.rename(columns={by: "type"}).astype({"type": str})


def _lines(stability: pd.DataFrame, typed: bool) -> list[str]:
    lines = []
    for layer, rows in stability.groupby("layer", sort=False):
        first, last = rows.iloc[0], rows.iloc[-1]
        shares = f"{100 * first.same_type:.0f} % and {100 * last.same_type:.0f} %"
        kept = f"; {shares} of the units keep their type" if typed else ""
        lines.append(
            f"{layer}: ARI of the clusters between epochs {first.epoch_a} and {first.epoch_b} {first.ari:.2f}, between "
            f"{last.epoch_a} and {last.epoch_b} {last.ari:.2f}{kept}"
        )
    return lines


_COLUMNS = ["layer", "epoch_a", "epoch_b", "units", "ari", "same_type"]
