"""Figures of the analysis ``cascade``, drawn from its tables."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from nodelens.results.findings import Findings

from .figures import COLOURS, plt, png, short

_GREY = "#9aa2ad"


def figures_of(found: Findings) -> Iterator[tuple[str, bytes, str]]:
    """Name, picture and caption of each figure."""
    if len(found["types"]):
        yield (
            "types",
            types(found["types"]),
            "Change of the loss when k units of one type are removed together, mean over sets. Grey: random units, with "
            "the 95 % interval of their draws.",
        )
    if len(found["pairs"]):
        yield "pairs", pairs(found["pairs"]), "Interaction of pairs of units: damage of both less that of each, one dot per pair."


def types(table: pd.DataFrame) -> bytes:
    """Damage against the number of units removed, one panel per layer and one line per type."""
    layers = list(dict.fromkeys(table["layer"]))
    across = min(3, len(layers))
    down = -(-len(layers) // across)
    figure, axes = plt.subplots(down, across, figsize=(2.9 * across + 1.2, 2.2 * down), squeeze=False, layout="constrained")
    kinds = list(dict.fromkeys(table["type"]))
    for axis, layer in zip(axes.flat, layers, strict=False):
        own = table[table["layer"] == layer]
        random = own.drop_duplicates("count").sort_values("count")
        axis.fill_between(random["count"], random["random_low"], random["random_high"], color=_GREY, alpha=0.35, linewidth=0)
        axis.plot(random["count"], random["random"], color=_GREY, label="random")
        for kind, rows in own.groupby("type", sort=False):
            axis.plot(
                rows["count"], rows["damage"], "o-", markersize=3, color=COLOURS[kinds.index(kind) % len(COLOURS)], label=kind
            )
        axis.set_title(short(str(layer), 28))
    for axis in axes.flat[len(layers) :]:
        axis.axis("off")
    handles = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=7, frameon=False, loc="outside right upper")
    figure.supxlabel("units removed", fontsize=9)
    figure.supylabel("change of the loss", fontsize=9)
    return png(figure)


def pairs(table: pd.DataFrame) -> bytes:
    """Interaction of each pair, by kind of pair."""
    kinds = list(dict.fromkeys(table["pair"]))
    figure, axis = plt.subplots(figsize=(5.0, 1.0 + 0.5 * len(kinds)), layout="constrained")
    axis.axvline(0, color=_GREY, linewidth=1, linestyle=":")
    for k, kind in enumerate(kinds):
        values = table.loc[table["pair"] == kind, "interaction"].to_numpy()
        axis.scatter(values, k + np.linspace(-0.2, 0.2, len(values)), s=9, color=COLOURS[k % len(COLOURS)], linewidth=0)
    axis.set_yticks(range(len(kinds)), kinds)
    axis.set_xlabel("interaction: damage of both less that of each")
    return png(figure)
