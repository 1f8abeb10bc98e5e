"""Plots of clusters over a training: the types of the units after each epoch, and how many keep theirs."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from nodelens.results.findings import Findings

from .charts import grid, line, panels
from .clusters_figures import COLOUR_OF
from .epoch_pictures import epoch_ticks, pictures
from .plot import COLOURS, Plot, colour, whole_ticks


def figures_of(found: Findings) -> Iterator[Plot]:
    """The plots over the epochs of a training."""
    if not len(found["types"]):
        return
    kinds = _colours(found)
    yield Plot("types", "Which kinds of units emerge?", _TYPES, _shares(found["types"], kinds), found["types"])
    if len(found["stability"]):
        yield Plot("stability", "Do units stay in their clusters?", _STABILITY, _stability(found["stability"]), found["stability"])
    yield Plot("units", "Which units change their kind?", _units_caption(kinds), _units(found, kinds), found["labels"])


def _colours(found: Findings) -> dict[str, str]:
    """{type or cluster: colour}, of those that occur."""
    there = set(found["types"]["type"])
    if found.metadata["typed"]:
        known = {kind: shade for kind, shade in COLOUR_OF.items() if kind in there}
        return known | {kind: colour(k) for k, kind in enumerate(sorted(there - set(known)))}
    return {name: colour(k) if name != "-1" else COLOUR_OF["none"] for k, name in enumerate(sorted(there, key=int))}


def _shares(table: pd.DataFrame, kinds: dict[str, str]) -> Any:
    """Shares of the kinds over epochs, one panel per layer."""

    def draw(layer: Any) -> list[dict[str, Any]]:
        rows = table[table["layer"] == layer]
        found = []
        for k, (kind, shade) in enumerate(kinds.items()):
            own = rows[rows["type"] == kind]
            style = {"color": shade, "width": 1.8}
            found.append(line(own["epoch"], own["share"], kind, k, line=style, marker={"color": shade, "size": 4}))
        return found

    axes = {"x": whole_ticks(table["epoch"]), "y": {"rangemode": "tozero"}}
    return panels(list(dict.fromkeys(table["layer"])), draw, "epoch", "share of the units", axes=axes)


def _stability(table: pd.DataFrame) -> Any:
    """Adjusted Rand index of the clusters of consecutive epochs, one row per layer."""
    values = table.pivot(index="layer", columns="epoch_b", values="ari").loc[list(dict.fromkeys(table["layer"]))]
    figure = grid(values, "adjusted Rand index", "epoch", "layer", limits=(0, 1))
    return figure.update_layout(xaxis=epoch_ticks(list(values.columns)))


def _units(found: Findings, kinds: dict[str, str]) -> Any:
    """The kind of each unit after each epoch, one picture per layer."""
    column, numbers = "type" if found.metadata["typed"] else "cluster", {kind: float(k) for k, kind in enumerate(kinds)}
    tables, words = {}, {}
    for layer, rows in found["labels"].groupby("layer", sort=False):
        own = rows.pivot(index="unit", columns="epoch", values=column).map(lambda kind: "" if pd.isna(kind) else str(kind))
        tables[str(layer)], words[str(layer)] = own.map(numbers.get).astype(float), own
    return pictures(tables, words, list(kinds.values()) or COLOURS, "layer")


def _units_caption(kinds: dict[str, str]) -> str:
    return f"One row per unit, one column per epoch. The colours are those of the figure above: {', '.join(kinds)}."


_TYPES = "Share of the units of each layer by type, or by cluster where clusters have no type, after each epoch."
_STABILITY = (
    "Adjusted Rand index of the clusters of an epoch with those of the one before. 1: no unit moved; 0: no more alike than by "
    "chance."
)
