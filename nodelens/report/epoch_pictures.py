"""Pictures of units over the epochs of a training: a row per unit, a column per epoch, and colours for what the unit is in."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from .charts import spread
from .plot import figure_of, names_axis, one_of, text, whole_ticks

_UNITS, _MOST = 300, 48  # rows of a picture, and pictures in a menu


def pictures(tables: Mapping[str, pd.DataFrame], words: Mapping[str, pd.DataFrame], shades: Sequence[str], what: str) -> Any:
    """One picture at a time, chosen in a menu.

    tables: {label: numbers of colours, units x epochs}; NaN is left empty. words: what the pointer shows, of the same shape. what:
    the label of the menu. Units are in the order of their colours in the last epoch, then in those before.
    """
    labels = spread(list(tables), _MOST)
    traces = [_trace(tables[label], words[label], shades) for label in labels]
    epochs = list(next(iter(tables.values())).columns)
    axis = names_axis(epochs, "epoch") | {"ticks": ""} | epoch_ticks(epochs)
    up = {"title": {"text": "units"}, "showticklabels": False, "ticks": "", "showgrid": False, "autorange": "reversed"}
    return figure_of(traces, 400, xaxis=axis, yaxis=up, updatemenus=one_of(what, traces, labels))


def _trace(table: pd.DataFrame, words: pd.DataFrame, shades: Sequence[str]) -> dict[str, Any]:
    table = table.sort_values(list(table.columns[::-1]), kind="stable").iloc[:_UNITS]
    count = len(shades)
    steps = [[edge, shade] for k, shade in enumerate(shades) for edge in (k / count, (k + 1) / count)]
    hover = [[f"unit {text(unit)}, {text(word)}" for word in row] for unit, row in words.loc[table.index].iterrows()]
    trace = {"type": "heatmap", "z": table.to_numpy(float), "zmin": -0.5, "zmax": count - 0.5, "colorscale": steps}
    trace |= {"showscale": False, "customdata": hover, "hoverongaps": False}
    return trace | {"hovertemplate": "%{customdata}<extra></extra>"}


def epoch_ticks(epochs: Sequence[int]) -> dict[str, Any]:
    """Ticks of the columns at whole epochs, at most eleven where epochs follow each other."""
    shown = [value for value in whole_ticks(epochs).get("tickvals", []) if value in set(epochs)]
    return (
        {"tickvals": [list(epochs).index(value) for value in shown], "ticktext": [f"{value}" for value in shown]} if shown else {}
    )


def ranked(numbers: pd.DataFrame, most: int) -> pd.DataFrame:
    """Numbers of colours for labels: the largest labels of the last epoch first, then those of the epochs before.

    Labels beyond ``most`` share the number ``most``, so that no two large ones look alike; -1 is NaN.
    """
    known = numbers.to_numpy().ravel()
    labels, counts = np.unique(known[known >= 0], return_counts=True)
    last = {label: int((numbers.iloc[:, -1] == label).sum()) for label in labels}
    order = sorted(zip(labels, counts, strict=True), key=lambda each: (-last[each[0]], -each[1], each[0]))
    places = {label: float(min(place, most)) for place, (label, _) in enumerate(order)}
    return numbers.map(lambda label: places.get(label, np.nan))
