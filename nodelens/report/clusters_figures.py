"""Figures of clusters in metric space, drawn from saved findings."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from nodelens.results.findings import Findings

from .figures import COLOURS, plt, png, short

COLOUR_OF = {
    "critical": COLOURS[1],
    "redundant": COLOURS[0],
    "synergistic": COLOURS[2],
    "background": COLOURS[7],
    "none": "#c9ced6",
}
PANELS = 9  # layers with a scatter of their own, evenly chosen


def figures_of(found: Findings) -> Iterator[tuple[str, bytes, str]]:
    """Name, picture and caption of each figure."""
    if not len(found["layers"]):
        return
    yield "scatter", scatter(found), "Units of a layer in the space of two metrics, coloured by type; crosses are cluster means."
    yield "composition", composition(found), "Share of the units of each layer by type, or by cluster where clusters have no type."
    yield "centroids", centroids(found), "Centroid of each cluster, in standard deviations of the units of its layer."
    if len(found["ablations"]):
        yield (
            "ablations",
            ablations(found),
            "Agreement (adjusted Rand index) of the clusters found with fewer features with those of all features.",
        )
    if len(found["numbers"]):
        yield "numbers", numbers(found), "Mean silhouette by number of clusters, a line per layer; the dot is the number in use."


def scatter(found: Findings) -> bytes:
    """The first two features of the units of each layer; the size of a dot grows with the third."""
    features, points = _features(found), found["points"]
    layers = _spread(list(dict.fromkeys(points.index.get_level_values("layer"))), PANELS)
    first, second = features[0], features[min(1, len(features) - 1)]
    across = min(3, len(layers))
    down = -(-len(layers) // across)
    figure, axes = plt.subplots(down, across, figsize=(3.2 * across + 1, 2.7 * down), squeeze=False, layout="constrained")
    colours = _colours(found)
    for axis, layer in zip(axes.flat, layers, strict=False):
        rows = points.loc[[layer]]
        for key, some in rows.groupby(_key(found), sort=False):
            axis.scatter(
                some[first], some[second], s=_sizes(rows, some, features), color=colours[str(key)], linewidth=0, alpha=0.75
            )
        means = found["clusters"].loc[found["clusters"]["layer"] == layer]
        axis.scatter(means[first], means[second], marker="x", s=36, color="#1c1f24", linewidth=1)
        axis.set_title(short(str(layer), 30))
    for axis in axes.flat[len(layers) :]:
        axis.remove()
    figure.supxlabel(_label(found, first), fontsize=9)
    figure.supylabel(_label(found, second), fontsize=9)
    _legend(figure, colours)
    return png(figure)


def composition(found: Findings) -> bytes:
    """Share of the units of each layer by type, one bar per layer."""
    points = found["points"]
    counts = points.groupby([points.index.get_level_values("layer"), _key(found)], sort=False).size().unstack(fill_value=0)
    shares = counts.div(counts.sum(axis=1), axis=0)
    figure, axis = plt.subplots(figsize=(6, 1.1 + 0.26 * len(shares)), layout="constrained")
    left, colours = np.zeros(len(shares)), _colours(found)
    for key in sorted(shares, key=lambda k: list(colours).index(str(k))):
        axis.barh(range(len(shares)), shares[key], left=left, color=colours[str(key)], height=0.75)
        left += shares[key].to_numpy()
    axis.set_yticks(range(len(shares)), [short(str(name)) for name in shares.index])
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel="share of the units")
    _legend(figure, colours)
    return png(figure)


def centroids(found: Findings) -> bytes:
    """The centroid of each cluster, one panel per feature, layers from the first to the last."""
    clusters, colours = found["clusters"], _colours(found)
    columns = [c for c in clusters if str(c).startswith("z_")]
    layers = list(dict.fromkeys(clusters["layer"]))
    figure, axes = plt.subplots(
        1,
        len(columns),
        figsize=(2.4 * len(columns) + 2, 1.2 + 0.26 * len(layers)),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axis, column in zip(axes.flat, columns, strict=True):
        axis.axvline(0, color="#9aa2ad", linewidth=1, linestyle=":")
        place = clusters["layer"].map({layer: k for k, layer in enumerate(layers)})
        colour = [colours[str(key)] for key in clusters[_key(found, "type")]]
        axis.scatter(clusters[column], place, s=12 + 60 * clusters["share"], c=colour, linewidth=0, alpha=0.85)
        axis.set_xlabel(str(column).removeprefix("z_") + ", sd")
        axis.set_yticks(range(len(layers)), [short(str(name)) for name in layers])
    axes.flat[0].set_ylim(len(layers) - 0.4, -0.6)
    _legend(figure, colours)
    return png(figure)


def ablations(found: Findings) -> bytes:
    """Agreement with fewer features, one box per set of features over the layers."""
    table = found["ablations"]
    sets = list(dict.fromkeys(table["features"]))[1:]
    figure, axis = plt.subplots(figsize=(5.6, 1.1 + 0.28 * len(sets)), layout="constrained")
    values = [table[table["features"] == name]["ari"].dropna() for name in sets]
    axis.boxplot(values, orientation="horizontal", widths=0.6, medianprops={"color": COLOURS[1]}, flierprops={"markersize": 2})
    axis.set_yticks(range(1, len(sets) + 1), sets)
    axis.invert_yaxis()
    axis.set(xlabel="adjusted Rand index with all features", xlim=(min(-0.05, axis.get_xlim()[0]), 1.02))
    return png(figure)


def numbers(found: Findings) -> bytes:
    """Silhouette by number of clusters."""
    table, chosen = found["numbers"], found["layers"]["n_clusters"]
    figure, axis = plt.subplots(figsize=(4.8, 3.2), layout="constrained")
    layers = list(dict.fromkeys(table["layer"]))
    for k, layer in enumerate(layers):
        rows = table[table["layer"] == layer]
        colour = plt.get_cmap("viridis")(0.9 * k / max(len(layers) - 1, 1))
        name = short(str(layer), 24) if len(layers) <= 8 or k in (0, len(layers) - 1) else None
        axis.plot(rows["n_clusters"], rows["silhouette"], color=colour, linewidth=1, label=name)
        used = rows[rows["n_clusters"] == chosen.get(layer)]
        axis.scatter(used["n_clusters"], used["silhouette"], s=18, color=[colour])
    axis.set(xlabel="number of clusters", ylabel="silhouette")
    axis.legend(frameon=False, fontsize=7)
    return png(figure)


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
        return {kind: colour for kind, colour in COLOUR_OF.items() if kind in there}
    labels = sorted(set(found["points"]["cluster"]))
    return {str(k): COLOUR_OF["none"] if k < 0 else COLOURS[k % len(COLOURS)] for k in labels}


def _sizes(every: pd.DataFrame, some: pd.DataFrame, features: list[str]) -> pd.Series | float:
    """Areas of dots, by the rank of the third feature within the layer."""
    return 14.0 if len(features) < 3 else 6 + 34 * every[features[2]].rank(pct=True).loc[some.index].fillna(0)


def _spread(layers: list[str], most: int) -> list[str]:
    """At most so many layers, evenly chosen from the first to the last."""
    return layers if len(layers) <= most else [layers[k] for k in np.linspace(0, len(layers) - 1, most).round().astype(int)]


def _legend(figure: plt.Figure, colours: dict[str, str]) -> None:
    dots = [plt.Line2D([], [], marker="o", linestyle="", markersize=5, color=colour) for colour in colours.values()]
    figure.legend(dots, list(colours), loc="outside right upper", frameon=False, fontsize=8)
