"""Plots of halos across layers, made from saved findings."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from nodelens.results.findings import Findings
from nodelens.results.histograms import histogram

from .charts import PANELS, dots, heat, panels, spread
from .plot import COLOURS, GREY, Plot, figure_of, names_axis, rows_axis, rows_height, short, text


def figures_of(found: Findings) -> Iterator[Plot]:
    """The plots of an analysis."""
    if not len(found["pairs"]):
        return
    yield Plot("halo", "Does a cluster have a halo in the next layer?", _HALO, halo(found), found["pairs"])
    yield Plot("shares", "How much of its input each unit takes from the cluster", _SHARES, shares(found), found["receivers"])
    yield Plot("flow", "Which cluster feeds which", _FLOW, flow(found), found["flow"])


def halo(found: Findings) -> Any:
    """The share of the halo in each pair of layers against its baseline."""
    pairs = found["pairs"]
    place = np.arange(len(pairs))
    random = {"symbol": "line-ns", "size": 9, "line": {"width": 2, "color": GREY}, "color": GREY}
    traces = [dots(pairs["null"], place, "random units", error=1.96 * pairs["null_sd"], marker=random)]
    symbol = np.where(pairs["p"] <= 0.05, "circle", "circle-open")
    hover: dict[str, Any] = {"text": [f"p {p:.3g}" for p in pairs["p"]], "hovertemplate": "%{x:.3g}, %{text}<extra></extra>"}
    traces.append(dots(pairs["share"], place, "halo", 1, marker={"symbol": symbol, "size": 9, "color": COLOURS[1]}, **hover))
    axis = {"title": {"text": f"share of the halo's input from {text(pairs['cluster'].iloc[0])} units"}}
    names = [_pair(row) for row in pairs.itertuples()]
    return figure_of(traces, rows_height(len(pairs), 30), xaxis=axis, yaxis=rows_axis(names))


def shares(found: Findings) -> Any:
    """The shares of all receivers, one panel per pair of layers."""
    table, pairs = found["receivers"], _chosen(found)

    def draw(name: Any) -> list[dict[str, Any]]:
        rows = _rows(table, pairs[name])
        counts, edges = histogram(rows["share"], min(30, max(5, len(rows) // 4)))
        bars = {"type": "bar", "x": (edges[:-1] + edges[1:]) / 2, "y": counts, "name": "units", "marker": {"color": COLOURS[0]}}
        least = rows["share"][rows["halo"]].min()
        edge = {"type": "scatter", "mode": "lines", "x": [least, least], "y": [0, counts.max()], "name": "the halo begins"}
        return [bars, *([edge | {"line": {"color": COLOURS[1], "dash": "dash"}}] if pd.notna(least) else [])]

    return panels(list(pairs), draw, "share", "units", shared=False, axes={"y": {"rangemode": "tozero"}})


def flow(found: Findings) -> Any:
    """The flow between clusters, one panel per pair of layers."""
    table, pairs = found["flow"], _chosen(found)
    sources, targets = (list(dict.fromkeys(table[column])) for column in ("source", "target"))
    top = float(np.nan_to_num(table["flow"]).max()) or 1.0

    def draw(name: Any) -> list[dict[str, Any]]:
        rows = _rows(table, pairs[name])
        value, p = (rows.pivot(index="source", columns="target", values=c).reindex(sources, columns=targets) for c in ("flow", "p"))
        words = value.map("{:.2f}".format).where(~(p <= 0.05), value.map("{:.2f}*".format)).replace("nan", "")
        trace = heat(value.to_numpy(float), "flow", 0, top) | {"showscale": False}
        return [trace | {"text": words.to_numpy(), "texttemplate": "%{text}", "hovertemplate": "%{z:.3g}<extra></extra>"}]

    axes = {"x": names_axis(targets, most=14, tickangle=-30), "y": rows_axis(sources)}
    return panels(list(pairs), draw, "to", "from", height=270, shared=False, axes=axes)


def _chosen(found: Findings) -> dict[str, Any]:
    return {_pair(pair): pair for pair in spread(list(found["pairs"].itertuples()), PANELS)}


def _rows(table: pd.DataFrame, pair: Any) -> pd.DataFrame:
    return table[(table["layer"] == pair.layer) & (table["next"] == pair.next)]


def _pair(pair: Any) -> str:
    return f"{short(pair.layer, 18)} → {short(pair.next, 18)}"


_HALO = (
    "Share of the halo's input that comes from the cluster, and the mean and 95 % of random sets of units of the same size; filled "
    "where p <= 0.05."
)
_SHARES = "Share of each unit's input that comes from the cluster; the dashed line is where the halo begins."
_FLOW = "Share of the influence leaving a cluster (row) that enters a cluster of the next layer (column); * where p <= 0.05."
