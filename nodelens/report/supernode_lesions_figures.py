"""Plots of the analysis ``supernode_lesions``, made from its tables."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from nodelens.results.findings import Findings

from .charts import dots, line, panels
from .plot import GREY, Plot, figure_of, rows_axis


def figures_of(found: Findings) -> Iterator[Plot]:
    """The plots of an analysis."""
    if len(found["sets"]):
        yield Plot("sets", "Does removing a set hurt more than chance?", _SETS, sets(found["sets"]), found["sets"])
    if len(found["dose"]):
        yield Plot("dose", "Does the damage grow with the share of supernodes?", _DOSE, dose(found["dose"]), found["dose"])


def sets(table: pd.DataFrame) -> Any:
    """Damage of each set and of its control, one panel per kind of set and one row per layer."""
    groups = {
        f"{name}{f', {given} removed' if given else ''} vs {control}": own
        for (name, control, given), own in table.groupby(["set", "control", "given"], sort=False)
    }
    layers = list(dict.fromkeys(table["layer"]))

    def draw(title: Any) -> list[dict[str, Any]]:
        own = groups[title]
        rows = own["layer"].map(layers.index)
        mark: dict[str, Any] = {"symbol": "line-ns", "size": 9, "color": GREY, "line": {"width": 2, "color": GREY}}
        control = dots(own["control_damage"], rows, "random, 95 %", marker=mark)
        reach = (own["high"] - own["control_damage"], own["control_damage"] - own["low"])
        control["error_x"] = {
            "array": reach[0],
            "arrayminus": reach[1],
            "symmetric": False,
            "thickness": 3,
            "color": GREY,
            "width": 0,
        }
        return [control, dots(own["damage"], rows, "set", marker={"size": 8})]

    height = max(230, 60 + 20 * len(layers))
    return panels(list(groups), draw, "change of the loss", "", 3, height, axes={"y": rows_axis(layers)})


def dose(table: pd.DataFrame) -> Any:
    """Mean damage of the draws against the share of supernodes, one line per layer."""
    traces = []
    for k, (layer, own) in enumerate(table.groupby("layer", sort=False)):
        means = own.groupby("hit_rate")["damage"].mean()
        traces.append(line(means.index, means, str(layer), k))
    axes = {"xaxis": {"title": {"text": "share of supernodes"}}, "yaxis": {"title": {"text": "change of the loss"}}}
    return figure_of(traces, 400, **axes)


_SETS = "Change of the loss when a set of units is removed (dot), and of its random controls: mean, with the 95 % interval (grey)."
_DOSE = "Change of the loss against the share of supernodes in sets of as many units, mean over draws."
