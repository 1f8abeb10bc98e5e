"""Plots of the analysis ``validity``, made from its tables."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from nodelens.analysis.supernodes.agreement import MEAN, POOLED
from nodelens.analysis.validity.validity_analysis import RANDOM, TRUTH
from nodelens.results.findings import Findings

from .charts import at, band, diagonal, dots, line
from .plot import GREY, Plot, figure_of, rows_axis, rows_height, text

_MOST = 60  # metrics in one figure: the best and the worst


def figures_of(found: Findings) -> Iterator[Plot]:
    """The plots of an analysis."""
    if len(found["ranking"]):
        yield Plot("ranking", "Which metric predicts the damage of a removal?", _RANKING, ranking(found), found["ranking"])
    if "combination" in found.frames:
        figure = combination(found["combination"], found.metadata["criterion"]["terms"])
        yield Plot("combination", "Does a product of metrics predict it better?", _COMBINATION, figure, found["combination"])
    if len(found["growing"]):
        figure = growing(found["growing"])
        yield Plot("growing", "Which order of removal hurts least?", _GROWING, figure, found["growing"])
    if len(found["pairs"]):
        yield Plot("interaction", "Do pairs of units interact?", _PAIRS, pairs(found["pairs"]), found["pairs"])


def ranking(found: Findings) -> Any:
    """Correlation with the damage, one row per metric, the best on top."""
    table = found["ranking"].dropna(subset="spearman")
    table = table if len(table) <= _MOST else pd.concat([table.head(_MOST // 2), table.tail(_MOST // 2)])
    where = {metric: k for k, metric in enumerate(table.index)}
    layers = found["agreement"]
    layers = layers[~layers["layer"].isin([POOLED, MEAN]) & layers["metric"].isin(table.index)]
    hover: dict[str, Any] = {
        "text": [text(layer) for layer in layers["layer"]],
        "hovertemplate": "%{text}<br>%{x:.3f}<extra></extra>",
    }
    single = dots(layers["spearman"], layers["metric"].map(where), "single layers", marker={"color": GREY, "size": 5}, **hover)
    mean = dots(table["spearman"], np.arange(len(table)), "all units, 95 %", marker={"size": 7})
    low, high = ((table["spearman"] - table[side]).abs().fillna(0) for side in ("low", "high"))
    mean["error_x"] = {"array": high, "arrayminus": low, "symmetric": False, "thickness": 1, "width": 2}
    axis = {"title": {"text": "Spearman correlation with the damage"}}
    height = rows_height(len(table), 20, most=1400)
    return figure_of([single, mean], height, xaxis=axis, yaxis=rows_axis(list(table.index)), shapes=[at(0)])


def combination(table: pd.DataFrame, exponents: Mapping[str, float]) -> Any:
    """Correlation of the product and of each metric with the damage, on the half of the search and on the other."""
    place = np.arange(len(table))
    low, high = ((table["spearman"] - table[side]).abs().fillna(0) for side in ("low", "high"))
    bars = {"array": high, "arrayminus": low, "symmetric": False, "thickness": 1, "width": 2}
    held = dots(table["spearman"], place, "other half, 95 %", marker={"size": 7}) | {"error_x": bars}
    fit = dots(table["fit"], place, "half of the search", marker={"color": GREY, "size": 5})
    powers = " ".join(f"{name}^{exponent:g}" for name, exponent in exponents.items())
    axis = {"title": {"text": f"Spearman correlation with the damage<br>product: {text(powers)}"}}
    return figure_of([fit, held], rows_height(len(table), 28), xaxis=axis, yaxis=rows_axis(list(table.index)), shapes=[at(0)])


def growing(table: pd.DataFrame) -> Any:
    """Damage against the share removed, one line per order; the random orders as a band."""
    traces = []
    drawn = table[table["order"] == RANDOM].groupby("share")["damage"]
    if drawn.ngroups:
        found = drawn.agg(["min", "mean", "max"])
        traces.append(band(100 * found.index, found["min"], found["max"], "random, range"))
        traces.append(line(100 * found.index, found["mean"], "random", line={"color": GREY}, marker={"color": GREY, "size": 4}))
    for k, (order, rows) in enumerate(table[table["order"] != RANDOM].groupby("order", sort=False)):
        traces.append(line(100 * rows["share"], rows["damage"], order, k, rows["damage_se"]))
        if order == TRUTH:
            traces[-1]["line"] = traces[-1]["line"] | {"dash": "dash", "width": 2.5}
    axes = {"xaxis": {"title": {"text": "share of the units of each layer that are removed, %"}}}
    return figure_of(traces, 440, **axes, yaxis={"title": {"text": "change of the loss"}})


def pairs(table: pd.DataFrame) -> Any:
    """Damage of both units of a pair against the sum of that of each."""
    both = table[["alone", "damage"]].to_numpy(float)
    dot = dots(table["alone"], table["damage"], "pairs", showlegend=False)
    dot["error_y"] = {"array": 2 * table["interaction_se"].fillna(0), "thickness": 1, "width": 0}
    axes = {"xaxis": {"title": {"text": "sum of the damage of each"}}, "yaxis": {"title": {"text": "damage of both"}}}
    return figure_of([diagonal(np.nanmin(both), np.nanmax(both)), dot], 420, **axes)


_RANKING = (
    "Spearman correlation of each metric with the change of the loss when a unit is removed, over all units, with its 95 % "
    "bootstrap interval. Grey dots are single layers."
)
_COMBINATION = (
    "The exponents of the product are those that order half of the units best. On the other half, with 95 % bootstrap intervals "
    "over units, it is compared with its metrics; the columns of gain tell by how much it is above each."
)
_GROWING = (
    "Change of the loss when growing shares of the units of each layer are removed, lowest score first. The band spans the random "
    "orders."
)
_PAIRS = "One dot per pair; bars are two standard errors of the difference. On the dotted line units do not interact."
