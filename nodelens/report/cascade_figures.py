"""Plots of the analysis ``cascade``, made from its tables."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from nodelens.results.findings import Findings

from .charts import at, band, dots, line, panels
from .plot import GREY, Plot, figure_of, rows_axis, rows_height, short


def figures_of(found: Findings) -> Iterator[Plot]:
    """The plots of an analysis."""
    if len(found["types"]):
        yield Plot("types", "What several units of one type do together", _TYPES, types(found["types"]), found["types"])
    if len(found["pairs"]):
        yield Plot("interaction", "Do pairs of units stand in for each other?", _PAIRS, pairs(found["pairs"]), found["pairs"])


def types(table: pd.DataFrame) -> Any:
    """Damage against the number of units removed, one panel per layer and one line per type."""
    kinds = list(dict.fromkeys(table["type"]))

    def draw(layer: object) -> list[dict[str, Any]]:
        own = table[table["layer"] == layer]
        random = own.drop_duplicates("count").sort_values("count")
        found = [band(random["count"], random["random_low"], random["random_high"], "random, 95 %")]
        found.append(line(random["count"], random["random"], "random", line={"color": GREY}, marker={"color": GREY, "size": 4}))
        by = own.groupby("type", sort=False)
        return found + [line(rows["count"], rows["damage"], kind, kinds.index(kind)) for kind, rows in by]

    return panels(list(dict.fromkeys(table["layer"])), draw, "units removed", "change of the loss", shared=False)


def pairs(table: pd.DataFrame) -> Any:
    """Interaction of each pair, by kind of pair."""
    kinds = list(dict.fromkeys(table["pair"]))
    traces = []
    for k, kind in enumerate(kinds):
        values = table.loc[table["pair"] == kind, "interaction"].to_numpy()
        traces.append(dots(values, k + np.linspace(-0.25, 0.25, len(values)), kind, k, showlegend=False))
    axis = {"title": {"text": "interaction: damage of both less that of each"}}
    names = [short(kind) for kind in kinds]
    return figure_of(traces, rows_height(len(kinds), 50), xaxis=axis, yaxis=rows_axis(names), shapes=[at(0)])


_TYPES = (
    "Change of the loss when k units of one type are removed together, mean over sets. Grey: random units, with the 95 % interval "
    "of their draws."
)
_PAIRS = "Damage of both units less that of each, one dot per pair. At 0 the units do not interact."
