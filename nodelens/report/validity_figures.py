"""Figures of the analysis ``validity``, drawn from its tables."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from nodelens.analysis.supernodes.agreement import MEAN, POOLED
from nodelens.analysis.validity.validity_analysis import RANDOM, TRUTH
from nodelens.results.findings import Findings

from .figures import COLOURS, plt, png

_GREY = "#9aa2ad"
_MOST = 40  # metrics in one figure: the best and the worst


def figures_of(found: Findings) -> Iterator[tuple[str, bytes, str]]:
    """Name, picture and caption of each figure."""
    if len(found["ranking"]):
        yield (
            "ranking",
            ranking(found),
            "Spearman correlation of each metric with the change of the loss when a unit is removed, over all units, with its 95 % "
            "bootstrap interval. Grey dots are single layers.",
        )
    if len(found["growing"]):
        yield (
            "growing",
            growing(found["growing"]),
            "Change of the loss when growing shares of the units of each layer are removed, lowest score first. The band spans the "
            "random orders.",
        )
    if len(found["pairs"]):
        yield (
            "pairs",
            pairs(found["pairs"]),
            "Damage of pairs of units of one layer against the sum of the damage of each; bars are two standard errors of the "
            "difference. On the line units do not interact.",
        )


def ranking(found: Findings) -> bytes:
    """Correlation with the damage, one row per metric, the best on top."""
    table = found["ranking"].dropna(subset="spearman")
    table = table if len(table) <= _MOST else pd.concat([table.head(_MOST // 2), table.tail(_MOST // 2)])
    place = np.arange(len(table))
    figure, axis = plt.subplots(figsize=(5.8, 1.0 + 0.21 * len(table)), layout="constrained")
    axis.axvline(0, color=_GREY, linewidth=1, linestyle=":")
    layers = found["agreement"]
    layers = layers[~layers["layer"].isin([POOLED, MEAN]) & layers["metric"].isin(table.index)]
    at = {metric: k for k, metric in enumerate(table.index)}
    axis.scatter(layers["spearman"], layers["metric"].map(at), s=7, color=_GREY, linewidth=0)
    reach = np.stack([table["spearman"] - table["low"], table["high"] - table["spearman"]]).clip(0)
    axis.errorbar(table["spearman"], place, xerr=reach, fmt="o", markersize=3.5, color=COLOURS[0], capsize=2, linewidth=1)
    axis.set_yticks(place, table.index)
    axis.set_xlabel("Spearman correlation with the damage")
    axis.invert_yaxis()
    return png(figure)


def growing(table: pd.DataFrame) -> bytes:
    """Damage against the share removed, one line per order; the random orders as a band."""
    figure, axis = plt.subplots(figsize=(5.8, 3.6), layout="constrained")
    drawn = table[table["order"] == RANDOM].groupby("share")["damage"]
    if drawn.ngroups:
        band = drawn.agg(["min", "mean", "max"])
        axis.fill_between(100 * band.index, band["min"], band["max"], color=_GREY, alpha=0.35, linewidth=0)
        axis.plot(100 * band.index, band["mean"], color=_GREY, label="random")
    for k, (order, rows) in enumerate(table[table["order"] != RANDOM].groupby("order", sort=False)):
        style: dict[str, Any] = (
            {"color": "#1c1f24", "linestyle": "--"} if order == TRUTH else {"color": COLOURS[(k - 1) % len(COLOURS)]}
        )
        axis.errorbar(100 * rows["share"], rows["damage"], yerr=rows["damage_se"], capsize=2, linewidth=1, label=order, **style)
    axis.set(xlabel="share of the units of each layer that are removed, %", ylabel="change of the loss")
    figure.legend(fontsize=7, frameon=False, loc="outside right upper")
    return png(figure)


def pairs(table: pd.DataFrame) -> bytes:
    """Damage of both units of a pair against the sum of that of each."""
    figure, axis = plt.subplots(figsize=(4.4, 4.0), layout="constrained")
    ends = [min(table["alone"].min(), table["damage"].min()), max(table["alone"].max(), table["damage"].max())]
    axis.plot(ends, ends, color=_GREY, linewidth=1, linestyle=":")
    error = 2 * table["interaction_se"].fillna(0)
    axis.errorbar(table["alone"], table["damage"], yerr=error, fmt="o", markersize=3, linewidth=0.8, color=COLOURS[0])
    axis.set(xlabel="sum of the damage of each", ylabel="damage of both")
    return png(figure)
