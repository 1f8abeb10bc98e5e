"""Plots of modules over a training: modularity after each epoch, and how many units stay in their modules."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from nodelens.results.findings import Findings

from .charts import line, panels
from .plot import COLOURS, Plot, figure_of, names_axis, text, whole_ticks

_UNITS = 300  # rows of the picture of units


def figures_of(found: Findings) -> Iterator[Plot]:
    """The plots over the epochs of a training."""
    if not len(found["modules"]):
        return
    yield Plot("q", "Do modules emerge?", _Q, _lines(found["modules"], "epoch", ["q", "modules"]), found["modules"])
    if len(found["stability"]):
        figure = _lines(found["stability"], "epoch_b", ["ami", "alignment"])
        yield Plot("stability", "Do units stay in their modules?", _STABILITY, figure, found["stability"])
    for (layer, name), rows in found["labels"].groupby(["layer", "association"], sort=False):
        caption = f"Colours are modules by {name}, units in order of their last module; empty: in none."
        yield Plot(f"modules-{layer}-{name}", f"The module of each unit over epochs: {layer}, {name}", caption, units(rows), rows)


def units(rows: pd.DataFrame) -> Any:
    """The module of each unit after each epoch, as colours; units in order of their last module."""
    table = rows.pivot(index="unit", columns="epoch", values="module")
    table = table.sort_values(list(table.columns[::-1]), kind="stable").iloc[:_UNITS]
    numbers = table.to_numpy(float)
    count = len(COLOURS)
    steps = [[edge, shade] for k, shade in enumerate(COLOURS) for edge in (k / count, (k + 1) / count)]
    shown = np.where(numbers < 0, np.nan, numbers % count)
    hover = [[f"unit {text(unit)}: module {number:g}" for number in row] for unit, row in zip(table.index, numbers, strict=True)]
    trace = {"type": "heatmap", "z": shown, "zmin": -0.5, "zmax": count - 0.5, "colorscale": steps, "showscale": False}
    trace |= {"customdata": hover, "hovertemplate": "%{customdata}<extra></extra>", "hoverongaps": False}
    axis = names_axis(list(table.columns), "epoch")
    return figure_of([trace], 320, xaxis=axis, yaxis={"title": {"text": "units"}, "showticklabels": False, "autorange": "reversed"})


def _lines(table: pd.DataFrame, epoch: str, columns: list[str]) -> Any:
    """One panel per column, one line per layer and association."""

    def draw(column: Any) -> list[dict[str, Any]]:
        found = []
        for k, ((layer, name), rows) in enumerate(table.groupby(["layer", "association"], sort=False)):
            found.append(line(rows[epoch], rows[column], f"{layer}, {name}", k))
            if f"{column}_null" in rows:
                null: dict[str, Any] = {"mode": "lines", "showlegend": False, "opacity": 0.7}
                found.append(line(rows[epoch], rows[f"{column}_null"], f"{layer}, {name}", k, **null))
                found[-1]["line"] = found[-1]["line"] | {"dash": "dot"}
        return found

    return panels(columns, draw, "epoch", height=280, shared=False, axes={"x": whole_ticks(table[epoch])})


_Q = "Modularity and number of modules after each epoch. Dotted: modularity found in random graphs of the null model."
_STABILITY = (
    "How alike the modules of an epoch and those of the one before are: adjusted mutual information, and share of units in matched "
    "modules. 1: no unit moved. Dotted: alignment of shuffled units."
)
