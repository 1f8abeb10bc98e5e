"""Kinds of charts, each as a plotly figure of a table: lines, dots with errors, boxes, heatmaps, bars, scatters."""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .plot import COLOURS, DIVERGING, GREY, SEQUENTIAL, colour, dash, figure_of, names_axis, rows_axis, rows_height, text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PANELS = 12  # small charts in one figure
_LINES = 40


def line(x: Any, y: Any, name: object = "", k: int = 0, error: Any = None, **more: Any) -> dict[str, Any]:
    """A line with dots and, where an error is given, bars of it."""
    style = {"line": {"color": colour(k), "dash": dash(k), "width": 1.6}, "marker": {"color": colour(k), "size": 5}}
    bars = {} if error is None else {"error_y": {"array": np.nan_to_num(error), "thickness": 1, "width": 2}}
    return {"type": "scatter", "mode": "lines+markers", "x": x, "y": y, "name": text(name), **style, **bars, **more}


def dots(x: Any, y: Any, name: object = "", k: int = 0, error: Any = None, **more: Any) -> dict[str, Any]:
    """Dots with horizontal bars of their errors. Many of them are drawn by WebGL."""
    kind = "scattergl" if np.size(x) > 2000 else "scatter"
    bars = {} if error is None else {"error_x": {"array": np.nan_to_num(error), "thickness": 1, "width": 2}}
    marker = {"color": colour(k), "size": 6} | more.pop("marker", {})
    return {"type": kind, "mode": "markers", "x": x, "y": y, "name": text(name), "marker": marker, **bars, **more}


def band(x: Any, low: Any, high: Any, name: object = "", shade: str = GREY, **more: Any) -> dict[str, Any]:
    """The area between two curves."""
    x, low, high = (np.asarray(values, dtype=float) for values in (x, low, high))
    outline = {"x": np.concatenate([x, x[::-1]]), "y": np.concatenate([high, low[::-1]])}
    filled = {"mode": "lines", "fill": "toself", "fillcolor": _clear(shade), "line": {"width": 0, "color": shade}}
    return {"type": "scatter", **outline, **filled, "name": text(name), "hoverinfo": "skip", **more}


def box(values: Any, position: float) -> dict[str, Any] | None:
    """A horizontal box of values, from their quartiles; whiskers reach the outermost values within 1.5 interquartile ranges."""
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    if not len(known):
        return None
    low, middle, high = np.quantile(known, [0.25, 0.5, 0.75])
    inside = known[(known >= low - 1.5 * (high - low)) & (known <= high + 1.5 * (high - low))]
    return {"y": position, "q1": low, "median": middle, "q3": high, "lowerfence": inside.min(), "upperfence": inside.max()}


def boxes(found: Sequence[dict[str, Any] | None], name: object = "") -> dict[str, Any]:
    """One trace of boxes that ``box`` made."""
    known = [each for each in found if each is not None]
    columns = {key: [each[key] for each in known] for key in ("y", "q1", "median", "q3", "lowerfence", "upperfence")}
    style = {"orientation": "h", "line": {"color": COLOURS[0], "width": 1}, "fillcolor": _clear(COLOURS[0]), "width": 0.6}
    return {"type": "box", **columns, **style, "name": text(name), "showlegend": False}


def box_rows(values: dict[Hashable, Any], title: str, rows: str = "layer", limits: tuple[float, float] | None = None) -> "Figure":
    """One horizontal box per entry. rows: what the entries are; limits: of the axis, for values that may all be equal."""
    found = [box(each, k) for k, each in enumerate(values.values())]
    axis = {"title": {"text": title}, "showgrid": True} | ({"range": list(limits)} if limits else {})
    return figure_of([boxes(found)], rows_height(len(values)), xaxis=axis, yaxis=rows_axis(list(values), rows))


def grid(
    values: pd.DataFrame,
    label: str,
    x: str = "",
    y: str = "layer",
    words: pd.DataFrame | None = None,
    ticks: Sequence[object] | None = None,
    limits: tuple[float, float] | None = None,
    diverging: bool = False,
    hover: pd.DataFrame | None = None,
    most: int = 18,
) -> "Figure":
    """A heatmap of a table, its first row on top.

    words: what stands in the cells; hover: what a pointer shows beside the value; most: characters of a column's name
    """
    numbers = values.to_numpy(float)
    finite = np.abs(numbers[np.isfinite(numbers)])
    largest = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    low, high = limits or ((-largest, largest) if diverging else (None, None))
    trace = heat(numbers, label, low, high, DIVERGING if diverging else SEQUENTIAL)
    if words is not None:
        trace |= {"text": [[text(cell) for cell in row] for row in words.to_numpy()], "texttemplate": "%{text}"}
    rows, columns = [f"{y} {text(name)}".strip() for name in values.index], [f"{x} {text(name)}".strip() for name in values.columns]
    beside = hover if hover is not None else pd.DataFrame("", index=values.index, columns=values.columns)
    trace["customdata"] = [
        [f"{row}, {column}{'<br>' if cell else ''}{text(cell)}" for column, cell in zip(columns, cells, strict=True)]
        for row, cells in zip(rows, beside.to_numpy(), strict=True)
    ]
    trace["hovertemplate"] = f"%{{customdata}}<br>{text(label)} %{{z:.4g}}<extra></extra>"
    axis = names_axis(list(values.columns), x, most=most) if ticks is None else names_axis(ticks, x)
    height = max(rows_height(len(values)), 130 + 7 * len(label))  # so that the label fits beside the colours
    return figure_of([trace], height, xaxis=axis, yaxis=rows_axis(list(values.index), y))


def heat(numbers: np.ndarray, label: str, low: float | None = None, high: float | None = None, scale: str = SEQUENTIAL) -> dict:
    """The trace of a heatmap."""
    bar = {"title": {"text": text(label), "side": "right"}, "thickness": 12}
    limits = {} if low is None else {"zmin": low, "zmax": high}
    return {"type": "heatmap", "z": numbers, "colorscale": scale, "colorbar": bar, "hoverongaps": False, **limits}


def panels(
    names: Sequence[object],
    draw: Callable[[Any], list[dict[str, Any]]],
    x: str = "",
    y: str = "",
    across: int = 3,
    height: int = 230,
    shared: bool = True,
    axes: dict[str, dict[str, Any]] | None = None,
) -> "Figure":
    """Small charts side by side, at most twelve, evenly chosen from first to last. A name of the legend stands there once.

    draw: the traces of one name; shared: whether all panels have the same vertical axis. Panels that share none and have no label y
    are named by their axes.
    """
    chosen = spread(names, PANELS)
    across = min(across, max(1, len(chosen)))
    down = -(-len(chosen) // across)
    traces: list[dict[str, Any]] = []
    layout: dict[str, Any] = {"grid": {"rows": down, "columns": across, "pattern": "independent", "ygap": 0.45, "xgap": 0.12}}
    notes, seen = [], set()
    for k, name in enumerate(chosen):
        tail = str(k + 1) if k else ""
        for trace in draw(name):
            fresh = trace.get("name") not in seen and bool(trace.get("name"))
            seen.add(trace.get("name"))
            linked = {"legendgroup": trace.get("name"), "showlegend": fresh and trace.get("showlegend", True)}
            traces.append({**trace, **linked, "xaxis": f"x{tail}", "yaxis": f"y{tail}"})
        named = text(name) if not (shared or y) else ""
        layout[f"xaxis{tail}"] = {**(axes or {}).get("x", {}), "title": {"text": x if k >= len(chosen) - across else ""}}
        layout[f"yaxis{tail}"] = {**(axes or {}).get("y", {}), "title": {"text": named or (y if k % across == 0 else "")}}
        if "ticktext" in layout[f"yaxis{tail}"]:
            layout[f"yaxis{tail}"]["showticklabels"] = k % across == 0  # inner ones would cover the panel beside them
        if shared and k:
            layout[f"yaxis{tail}"]["matches"] = "y"
        notes.append(
            {
                "text": "" if named else text(name),
                "xref": f"x{tail} domain",
                "yref": f"y{tail} domain",
                "x": 0.5,
                "y": 1.0,
                "yanchor": "bottom",
            }
        )
    layout["annotations"] = [{**note, "showarrow": False, "font": {"size": 11}} for note in notes]
    return figure_of(traces, 90 + height * down, margin={"t": 34}, **layout)


def spread(names: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the names, evenly chosen from the first to the last."""
    if len(names) <= most:
        return list(names)
    return [names[k] for k in np.linspace(0, len(names) - 1, most).round().astype(int)]


def lines_of(table: pd.DataFrame, x: str, y: str, by: str | Sequence[str]) -> list[dict[str, Any]]:
    """One line per group of a table, at most 40, evenly chosen."""
    keys = [by] if isinstance(by, str) else list(by)
    found = list(table.groupby(keys, sort=False, dropna=False))
    return [line(rows[x], rows[y], ", ".join(map(str, key)), k) for k, (key, rows) in enumerate(spread(found, _LINES))]


def diagonal(low: float, high: float) -> dict[str, Any]:
    """A dotted line of equal values."""
    ends = [low, high] if math.isfinite(low) and math.isfinite(high) else [0, 1]
    style = {"line": {"color": GREY, "dash": "dot", "width": 1}, "hoverinfo": "skip", "showlegend": False}
    return {"type": "scatter", "mode": "lines", "x": ends, "y": ends, **style}


def at(position: float, along: str = "x", shade: str = GREY) -> dict[str, Any]:
    """A dotted line across a figure, for its ``shapes``."""
    other = "y" if along == "x" else "x"
    ends = {f"{along}0": position, f"{along}1": position, f"{other}0": 0, f"{other}1": 1, f"{other}ref": "paper"}
    return {"type": "line", **ends, "line": {"color": shade, "dash": "dot", "width": 1}}


def _clear(shade: str) -> str:
    """A colour, given as #rrggbb, that lets others through."""
    red, green, blue = (int(shade[k : k + 2], 16) for k in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.25)"
