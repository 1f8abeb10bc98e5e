"""The network as a graph of the data flow: layers as dots, pairs of layers as arrows, coloured by metrics."""

from typing import Any

import numpy as np
import pandas as pd

from nodelens.results.result import Result, values_of

from .metric_figures import means_of_layers
from .plot import GREY, SEQUENTIAL, Plot, figure_of, menu, short, text

_NAMED = 40  # layers whose names stand in the picture
_STEP = 60  # pixels between two layers with names
_WAVE = 0.18  # of layers in a row, which would hide each other's names


def network(result: Result) -> Plot:
    """The graph of the pairs of layers; menus choose the metric that colours the dots and the one that colours the arrows."""
    pairs = [(str(a), str(b)) for a, b in result.edges.index]
    place = _places(pairs)
    nodes = means_of_layers(result).reindex(list(place))
    nodes = nodes.loc[:, nodes.notna().any()]
    columns = [c for c in values_of(result.edges) if result.edges[c].notna().any()]
    ends = np.array([[*place[a], *place[b]] for a, b in pairs], dtype=float)
    depth, beside = max(x for x, _ in place.values()), max(abs(y) for _, y in place.values()) + 0.5
    height = int(min(700, 210 + 110 * 2 * beside))
    slope = (height - 150) / (2 * beside) / (1000 / (depth + 1))  # of a pair on the screen: pixels of a step up and to the right
    of_nodes, of_pairs = _nodes(place, nodes), _arrows(ends, pairs, result.edges, columns, slope)
    traces = [_lines(ends), *of_pairs, *of_nodes]
    figure = figure_of(
        traces,
        height,
        xaxis={"visible": False, "range": [-0.7, depth + 0.7]},
        yaxis={"visible": False, "range": [-beside, beside]},
        meta={"least": 160 + _STEP * int(depth)} if len(place) <= _NAMED else None,
        showlegend=False,
        updatemenus=[
            *([_menu("arrows", columns, 1, len(of_pairs), len(traces))] if len(columns) > 1 else []),
            *([_menu("dots", list(nodes), 1 + len(of_pairs), len(of_nodes), len(traces))] if len(nodes.columns) > 1 else []),
        ],
    )
    return Plot("network", "Pairs of layers along the data flow", _CAPTION, figure, result.edges[columns])


def _places(pairs: list[tuple[str, str]]) -> dict[str, tuple[float, float]]:
    """Where each layer stands: as far right as the longest way to it, and next to those of the same depth."""
    depth: dict[str, int] = {}
    for _ in range(len(pairs) + 1):  # a circle would never settle
        before = dict(depth)
        for a, b in pairs:
            depth[b] = max(depth.get(b, 0), depth.setdefault(a, 0) + 1)
        if depth == before or max(depth.values()) > len(pairs):
            break
    beside: dict[int, list[str]] = {}
    for name, deep in depth.items():
        beside.setdefault(deep, []).append(name)
    return {
        name: (deep, k - (len(names) - 1) / 2 + _WAVE * (-1) ** deep)
        for deep, names in sorted(beside.items())
        for k, name in enumerate(names)
    }


def _lines(ends: np.ndarray) -> dict:
    gap = np.full(len(ends), np.nan)
    x, y = (np.stack([ends[:, k], ends[:, k + 2], gap], 1).ravel() for k in (0, 1))
    return {"type": "scatter", "mode": "lines", "x": x, "y": y, "line": {"color": GREY, "width": 1}, "hoverinfo": "skip"}


def _arrows(ends: np.ndarray, pairs: list[tuple[str, str]], table: pd.DataFrame, columns: list[str], slope: float) -> list[dict]:
    """Arrows half way between layers, one trace per metric of pairs, of the pairs that have a value."""
    middle = (ends[:, :2] + ends[:, 2:]) / 2
    angle = 90 - np.degrees(np.arctan2(slope * (ends[:, 3] - ends[:, 1]), ends[:, 2] - ends[:, 0]))
    found = []
    for k, column in enumerate(columns):
        values = table[column].to_numpy(float)
        known = np.flatnonzero(np.isfinite(values))
        hover = [f"{text(pairs[i][0])} → {text(pairs[i][1])}<br>{text(column)} {values[i]:.4g}" for i in known]
        bar = {"title": {"text": text(column), "side": "right"}, "thickness": 10, "x": 1.0, "len": 0.9}
        marker = {
            "symbol": "arrow",
            "size": 15 if len(pairs) <= _NAMED else 5,
            "angle": angle[known],
            "color": values[known],
            "colorscale": "Plasma",
        }
        found.append(_marks(middle[known], hover, marker | {"showscale": True, "colorbar": bar}, k == 0))
    return found


def _nodes(place: dict[str, tuple[float, float]], nodes: pd.DataFrame) -> list[dict]:
    """Dots of layers, one trace per metric; plain ones without metrics."""
    where = np.array(list(place.values()), dtype=float)
    names = {"mode": "markers+text", "text": [text(short(name, 18)) for name in place]}
    names["textposition"] = ["top center" if deep % 2 == 0 else "bottom center" for deep, _ in place.values()]
    names = names if len(place) <= _NAMED else {}
    found = []
    for k, column in enumerate(nodes):
        hover = [f"{text(layer)}<br>{text(column)} {value:.4g}" for layer, value in nodes[column].items()]
        bar = {"title": {"text": text(column), "side": "top"}, "orientation": "h", "thickness": 8, "y": -0.25, "len": 0.5}
        style = {"size": 15, "line": {"color": GREY, "width": 1}} if names else {"size": 5}
        marker = style | {"color": nodes[column].to_numpy(float), "colorscale": SEQUENTIAL}
        found.append(_marks(where, hover, marker | {"showscale": True, "colorbar": bar}, k == 0) | names)
    return found or [_marks(where, [text(name) for name in place], {"size": 14, "color": GREY}, True) | names]


def _marks(where: np.ndarray, hover: list[str], marker: dict, visible: bool) -> dict:
    shown: dict[str, Any] = {"customdata": hover, "hovertemplate": "%{customdata}<extra></extra>", "visible": visible}
    return {"type": "scatter", "mode": "markers", "x": where[:, 0], "y": where[:, 1], "marker": marker, **shown}


def _menu(name: str, columns: list[str], first: int, count: int, every: int) -> dict:
    """A menu that changes only the traces of its kind."""
    found = menu(name, columns, [[k == one for k in range(count)] for one in range(count)])
    for button in found["buttons"]:
        button["method"] = "restyle"
        button["args"] = [{"visible": button["args"][0]["visible"]}, list(range(first, first + count))]
    return found


_CAPTION = (
    "Data flow from left to right. Dots are layers, coloured by a metric (means over units); arrows are pairs of layers, coloured "
    "by a metric of pairs; a pair without an arrow has no value."
)
