"""Figures of modules over a training: modularity after each epoch, and how many units stay in their modules."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from nodelens.results.findings import Findings

from .figures import COLOURS, plt, png, short

_UNITS = 200  # rows of the picture of units


def figures_of(found: Findings) -> Iterator[tuple[str, bytes, str]]:
    """Name, picture and caption of each figure over the epochs of a training."""
    if not len(found["modules"]):
        return
    yield "q", _lines(found["modules"], "epoch", ["q", "modules"]), "Modularity and number of modules after each epoch."
    if len(found["stability"]):
        yield (
            "stability",
            _lines(found["stability"], "epoch_b", ["ami", "alignment"]),
            "How alike the modules of an epoch and those of the one before are: adjusted mutual information, and share of units in "
            "matched modules. 1: no unit moved. Dotted: alignment of shuffled units.",
        )
    for (layer, name), rows in found["labels"].groupby(["layer", "association"], sort=False):
        yield f"units-{layer}-{name}", units(rows), f"Module of each unit of {layer} after each epoch, by {name}; white: in none."


def units(rows: pd.DataFrame) -> bytes:
    """The module of each unit after each epoch, as colours; units in order of their last module."""
    table = rows.pivot(index="unit", columns="epoch", values="module")
    table = table.sort_values(list(table.columns[::-1]), kind="stable").iloc[:_UNITS]
    figure, axis = plt.subplots(figsize=(1.6 + 0.28 * len(table.columns), 1.2 + 0.035 * len(table)), layout="constrained")
    shown = np.ma.masked_less(table.to_numpy(float), 0) % 20
    axis.imshow(shown, cmap="tab20", vmin=-0.5, vmax=19.5, aspect="auto", interpolation="nearest")
    axis.set_xticks(range(len(table.columns)), table.columns, fontsize=6)
    axis.set(xlabel="epoch", ylabel="units", yticks=[])
    return png(figure)


def _lines(table: pd.DataFrame, epoch: str, columns: list[str]) -> bytes:
    """One panel per column, one line per layer and association."""
    figure, axes = plt.subplots(1, len(columns), figsize=(3.6 * len(columns) + 1.2, 3.0), squeeze=False, layout="constrained")
    for axis, column in zip(axes.flat, columns, strict=True):
        for k, ((layer, name), rows) in enumerate(table.groupby(["layer", "association"], sort=False)):
            style = {"color": COLOURS[k % len(COLOURS)], "linewidth": 1}
            axis.plot(rows[epoch], rows[column], "-o", markersize=2.5, label=f"{short(str(layer), 20)}, {name}", **style)
            if f"{column}_null" in rows and column != "q":
                axis.plot(rows[epoch], rows[f"{column}_null"], ":", **style)
        axis.set(xlabel="epoch", ylabel=column)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=7)
    return png(figure)
