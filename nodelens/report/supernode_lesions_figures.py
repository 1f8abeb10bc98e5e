"""Figures of the analysis ``supernode_lesions``, drawn from its tables."""

from collections.abc import Iterator

import pandas as pd

from nodelens.results.findings import Findings

from .figures import COLOURS, plt, png, short

_GREY = "#9aa2ad"


def figures_of(found: Findings) -> Iterator[tuple[str, bytes, str]]:
    """Name, picture and caption of each figure."""
    if len(found["sets"]):
        yield (
            "sets",
            sets(found["sets"]),
            "Change of the loss when a set of units is removed (dot), and of its random controls: mean, with the 95 % interval of "
            "their draws (grey).",
        )
    if len(found["dose"]):
        yield (
            "dose",
            dose(found["dose"]),
            "Change of the loss against the share of supernodes in sets of as many units, mean over draws.",
        )


def sets(table: pd.DataFrame) -> bytes:
    """Damage of each set and of its control, one panel per kind of set and one row per layer."""
    groups = list(table.groupby(["set", "control", "given"], sort=False))
    layers = list(dict.fromkeys(table["layer"]))
    figure, axes = plt.subplots(
        1,
        len(groups),
        figsize=(1.6 + 2.1 * len(groups), 1.3 + 0.24 * len(layers)),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axis, ((name, control, given), own) in zip(axes.flat, groups, strict=True):
        rows = [layers.index(layer) for layer in own["layer"]]
        axis.hlines(rows, own["low"], own["high"], color=_GREY, linewidth=3)
        axis.plot(own["control_damage"], rows, "|", color=_GREY, markersize=8)
        axis.plot(own["damage"], rows, "o", color=COLOURS[0], markersize=4)
        beyond = f", {given} removed" if given else ""
        axis.set_title(f"{name}{beyond}\nvs {control}", fontsize=8)
    axes[0, 0].set_yticks(range(len(layers)), [short(str(layer), 28) for layer in layers], fontsize=7)
    axes[0, 0].set_ylim(len(layers) - 0.5, -0.5)
    figure.supxlabel("change of the loss", fontsize=9)
    return png(figure)


def dose(table: pd.DataFrame) -> bytes:
    """Mean damage of the draws against the share of supernodes, one line per layer."""
    figure, axis = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
    for k, (layer, own) in enumerate(table.groupby("layer", sort=False)):
        means = own.groupby("hit_rate")["damage"].mean()
        axis.plot(means.index, means, "o-", markersize=3, color=COLOURS[k % len(COLOURS)], label=short(str(layer), 28))
    axis.set(xlabel="share of supernodes", ylabel="change of the loss")
    if table["layer"].nunique() <= 12:
        axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return png(figure)
