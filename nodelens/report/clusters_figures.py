"""Plots of clusters in metric space, made from saved findings."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from nodelens.results.findings import Findings

from .charts import at, box_rows, dots, line, panels
from .plot import COLOURS, Plot, colour, figure_of, rows_axis, rows_height, text

COLOUR_OF = {
    "critical": COLOURS[1],
    "redundant": COLOURS[0],
    "synergistic": COLOURS[2],
    "background": COLOURS[6],
    "none": "#c9ced6",
}


def figures_of(found: Findings) -> Iterator[Plot]:
    """The plots of an analysis."""
    if not len(found["layers"]):
        return
    yield Plot("clusters", "Units in the space of two metrics", _SCATTER, scatter(found), found["points"])
    yield Plot("composition", "What the units of a layer are", _COMPOSITION, composition(found), shares_of(found))
    yield Plot("centroids", "Where the clusters of each layer lie", _CENTROIDS, centroids(found), found["clusters"])
    if len(found["ablations"]):
        yield Plot("ablations", "Does each metric matter to the clusters?", _ABLATIONS, ablations(found), found["ablations"])
    if len(found["numbers"]):
        yield Plot("numbers", "How many clusters there are", _NUMBERS, numbers(found), found["numbers"])


def scatter(found: Findings) -> Any:
    """The first two features of the units of each layer; the size of a dot grows with the third."""
    features, points = _features(found), found["points"]
    first, second = features[0], features[min(1, len(features) - 1)]
    colours = _colours(found)

    def draw(layer: object) -> list[dict[str, Any]]:
        rows = points.loc[[layer]]
        drawn = []
        for key, some in rows.groupby(_key(found), sort=False):
            marker = {"color": colours[str(key)], "size": _sizes(rows, some, features), "opacity": 0.8}
            units = [f"unit {unit}" for unit in some.index.get_level_values("unit")]
            shown: dict[str, Any] = {"text": units, "hovertemplate": "%{text}<br>%{x:.3g}, %{y:.3g}<extra>%{fullData.name}</extra>"}
            drawn.append(dots(some[first], some[second], key, marker=marker, **shown))
        means = found["clusters"].loc[found["clusters"]["layer"] == layer]
        cross = {"symbol": "x-thin", "size": 10, "color": COLOURS[3], "line": {"width": 2, "color": COLOURS[3]}}
        return [*drawn, dots(means[first], means[second], "cluster mean", marker=cross)]

    layers = list(dict.fromkeys(points.index.get_level_values("layer")))
    return panels(layers, draw, text(_label(found, first)), text(_label(found, second)), shared=False, height=260)


def shares_of(found: Findings) -> pd.DataFrame:
    """Share of the units of each layer by type or cluster."""
    points = found["points"]
    counts = points.groupby([points.index.get_level_values("layer"), _key(found)], sort=False).size().unstack(fill_value=0)
    return counts.div(counts.sum(axis=1), axis=0)


def composition(found: Findings) -> Any:
    """Share of the units of each layer by type, one bar per layer."""
    shares, colours = shares_of(found), _colours(found)
    style: dict[str, Any] = {"type": "bar", "orientation": "h", "y": list(range(len(shares)))}
    order = sorted(shares, key=lambda key: list(colours).index(str(key)))
    traces = [{**style, "x": shares[key], "name": text(key), "marker": {"color": colours[str(key)]}} for key in order]
    axis = {"title": {"text": "share of the units"}, "range": [0, 1]}
    return figure_of(traces, rows_height(len(shares)), barmode="stack", xaxis=axis, yaxis=rows_axis(list(shares.index)))


def centroids(found: Findings) -> Any:
    """The centroid of each cluster, one panel per feature, layers from the first to the last."""
    clusters, colours = found["clusters"], _colours(found)
    layers = list(dict.fromkeys(clusters["layer"]))
    clusters = clusters.assign(place=clusters["layer"].map({layer: k for k, layer in enumerate(layers)}))
    columns = {str(c).removeprefix("z_"): c for c in clusters if str(c).startswith("z_")}

    def draw(name: Any) -> list[dict[str, Any]]:
        drawn = []
        for key, rows in clusters.groupby(_key(found, "type"), sort=False):
            marker = {"color": colours[str(key)], "size": 6 + 14 * rows["share"], "opacity": 0.85}
            drawn.append(dots(rows[columns[name]], rows["place"], key, marker=marker))
        return drawn

    height = max(220, 60 + 18 * len(layers))
    return panels(list(columns), draw, "standard deviations", "", len(columns), height, axes={"y": rows_axis(layers)})


def ablations(found: Findings) -> Any:
    """Agreement with fewer features, one box per set of features over the layers."""
    table = found["ablations"]
    sets = list(dict.fromkeys(table["features"]))[1:]
    return box_rows(
        {name: table[table["features"] == name]["ari"] for name in sets}, "adjusted Rand index with all features", "features"
    )


def numbers(found: Findings) -> Any:
    """Silhouette by number of clusters."""
    table, chosen = found["numbers"], found["layers"]["n_clusters"]
    traces = []
    for k, (layer, rows) in enumerate(table.groupby("layer", sort=False)):
        traces.append(line(rows["n_clusters"], rows["silhouette"], layer, k, marker={"color": colour(k), "size": 4}))
        used = rows[rows["n_clusters"] == chosen.get(layer)]
        traces.append(dots(used["n_clusters"], used["silhouette"], layer, k, marker={"size": 11}, showlegend=False))
    axes = {"xaxis": {"title": {"text": "number of clusters"}}, "yaxis": {"title": {"text": "mean silhouette"}}}
    return figure_of(traces, 380, **axes, shapes=[at(0, "y")])


def _features(found: Findings) -> list[str]:
    return [c for c in found["points"] if c not in ("cluster", "type")]


def _label(found: Findings, feature: str) -> str:
    return f"ln {feature}" if feature in found.metadata["options"]["log"] else feature


def _key(found: Findings, of_points: str = "type") -> str:
    """The column that gives the colour: the type, or the cluster where clusters have no type."""
    return of_points if set(found["clusters"]["type"]) != {"none"} else "cluster"


def _colours(found: Findings) -> dict[str, str]:
    """{type or cluster: colour}, of those that occur, in the order of types."""
    if _key(found) == "type":
        there = set(found["points"]["type"])
        return {kind: shade for kind, shade in COLOUR_OF.items() if kind in there}
    labels = sorted(set(found["points"]["cluster"]))
    return {str(k): COLOUR_OF["none"] if k < 0 else colour(k) for k in labels}


def _sizes(every: pd.DataFrame, some: pd.DataFrame, features: list[str]) -> Any:
    """Diameters of dots, by the rank of the third feature within the layer."""
    return 7 if len(features) < 3 else (4 + 8 * every[features[2]].rank(pct=True).loc[some.index].fillna(0)).to_numpy()


_SCATTER = (
    "One panel per layer, at most twelve. Colours are types, or clusters where clusters have no type; crosses are cluster means; "
    "dots grow with the third metric."
)
_COMPOSITION = "Share of the units of each layer by type, or by cluster where clusters have no type."
_CENTROIDS = "Centroid of each cluster, in standard deviations of the units of its layer. Dots grow with the share of units."
_ABLATIONS = "Agreement (adjusted Rand index) of the clusters found with fewer features with those of all features, over layers."
_NUMBERS = "Mean silhouette by number of clusters, a line per layer; the large dot is the number in use."
