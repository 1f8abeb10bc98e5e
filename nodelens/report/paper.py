"""Figures for papers: a plotly figure of the report drawn by matplotlib, as PNG, SVG or PDF, with the data behind it as CSV.

plotly's own export starts a browser, which a compute node does not have. The figures of this package use a few kinds of traces, and
these are drawn here.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.path import Path as Outline

from nodelens.results.files import write
from nodelens.results.spreadsheets import csv_text

from .paper_axes import draw_axis, plain_text, share_axes
from .paper_colours import map_of, shade_of, shades_of
from .plot import FORMATS, GREY, Plot

_STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "svg.fonttype": "none",  # text stays text
    "pdf.fonttype": 42,
    "svg.hashsalt": "nodelens",  # the same figure is the same file
}
_DPI, _PIXELS = 200, 100  # of a PNG; of the page per inch of paper
_DASHES: dict[str, Any] = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
_MARKERS: dict[str, Any] = {
    "diamond": "D",
    "square": "s",
    "cross": "P",
    "triangle-up": "^",
    "x-thin": "x",
    "line-ns": "|",
    "x": "x",
    "star": "*",
}
_MARKERS["arrow"] = Outline([(-0.6, -1), (0, 1), (0.6, -1), (0, -0.6), (-0.6, -1)])  # points up


def export(figure: Any, path: str | Path, table: pd.DataFrame | None = None, width: float = 6.5) -> Path:
    """Writes a figure that ``result.plot`` returned to a PNG, SVG or PDF file, and the data behind it to a CSV file beside it.

    width: in inches; the height follows from that of the page. table: the data; None: those that ``result.plot`` put into the
    figure. No browser is needed. Raises ValueError for another suffix, and where a CSV file of that name holds other data
    and there is no figure of that name whose data they could be.
    """
    path = Path(path)
    if path.suffix.removeprefix(".") not in FORMATS:
        raise ValueError(f"a figure is written to {', '.join(f'.{kind}' for kind in FORMATS)} files, not to {path.name!r}")
    table = table if table is not None else getattr(figure, "_table", None)
    words = csv_text(table) if table is not None and len(table) else ""
    _check_csv(path, words)
    _save(draw(figure, width), path)
    _write_csv(path, words)
    return path


def _save(drawn: Figure, path: Path) -> None:
    about = {} if path.suffix == ".png" else {"Date": None} if path.suffix == ".svg" else {"CreationDate": None}
    kind = path.suffix.removeprefix(".")
    with matplotlib.rc_context(_STYLE):
        write(path, lambda file: drawn.savefig(file, format=kind, dpi=_DPI, bbox_inches="tight", metadata=about))


def _check_csv(path: Path, words: str) -> None:
    """Raises ValueError where the CSV file beside a figure would replace one that no earlier export wrote."""
    beside = path.with_suffix(".csv")
    if not words or not beside.is_file() or any(path.with_suffix(f".{kind}").is_file() for kind in FORMATS):
        return
    if beside.read_bytes() != words.encode():
        raise ValueError(f"{path.name} has its data in {beside.name}, and {beside} holds other data: give the figure another name")


def _write_csv(path: Path, words: str) -> None:
    if words:
        write(path.with_suffix(".csv"), lambda file: file.write_bytes(words.encode()), listed=False)


def write_plots(plots: Iterable[Plot], folder: Path, formats: Sequence[str]) -> list[Path]:
    """Writes plots in each format to a folder, with their data. Characters of names that paths may not have become underscores."""
    paths = []
    for plot in plots:
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", plot.name)
        files = [folder / f"{name}.{kind}" for kind in formats]
        drawn = draw(plot.figure)
        for file in files:
            _save(drawn, file)
        for file in files[:1]:
            _write_csv(file, csv_text(plot.table) if len(plot.table) else "")
        paths += files
    return paths


def draw(figure: Any, width: float = 6.5) -> Figure:
    """A matplotlib figure of the visible traces of a plotly figure.

    It belongs to no window and no pyplot, so that the backend of a notebook stays as it is.
    """
    layout = figure.layout.to_plotly_json()
    traces = [trace.to_plotly_json() for trace in figure.data if trace.visible is not False]
    size = layout.get("grid") or {}
    down, across = size.get("rows", 1), size.get("columns", 1)
    height = max(1.8, width * layout.get("height", 380) / 900 if down == 1 else layout.get("height", 380) / _PIXELS)
    with matplotlib.rc_context(_STYLE):
        drawn = Figure(figsize=(width, height), layout="constrained")
        axes = drawn.subplots(down, across, squeeze=False)
        for k, axis in enumerate(axes.flat):
            tail = str(k + 1) if k else ""
            own = [trace for trace in traces if str(trace.get("yaxis", "y")) == f"y{tail}"]
            if own or not k:
                _panel(axis, own, layout, tail)
            else:
                axis.remove()
        share_axes(axes, layout)
        _legend(drawn, axes)
    return drawn


def _panel(axis: Axes, traces: list[dict[str, Any]], layout: dict[str, Any], tail: str) -> None:
    below: dict[Any, Any] = {}
    for k, trace in enumerate(traces):
        {"heatmap": _heatmap, "bar": _bars, "box": _boxes}.get(trace["type"], _scatter)(axis, trace, layout, below, k)
    for letter in "xy":
        draw_axis(axis, letter, layout.get(f"{letter}axis{tail}") or {})
    for shape in layout.get("shapes") or []:
        line = axis.axvline if shape.get("yref") == "paper" else axis.axhline
        line(shape["x0"] if shape.get("yref") == "paper" else shape["y0"], color=GREY, linewidth=0.8, linestyle=":")
    for note in layout.get("annotations") or []:
        if note.get("xref") == f"x{tail} domain":
            axis.set_title(plain_text(note["text"]), fontsize=7)


def _scatter(axis: Axes, trace: dict[str, Any], layout: dict[str, Any], below: dict[Any, Any], k: int) -> None:
    x, y = _values(trace.get("x")), _values(trace.get("y"))
    line, marker, mode = trace.get("line") or {}, trace.get("marker") or {}, trace.get("mode", "lines")
    name = plain_text(trace.get("name") or "") if trace.get("showlegend", True) else ""
    shade = line.get("color") or marker.get("color")
    if trace.get("fill") == "toself":
        axis.fill(x, y, color=line.get("color", GREY), alpha=0.25, linewidth=0, label=name or None)
        return
    label, plain = name or None, shade if isinstance(shade, str) else GREY
    if "lines" in mode:
        style = _DASHES.get(line.get("dash", "solid"), "-")
        steps = "steps-post" if line.get("shape") == "hv" else "default"
        width = 0.8 * line.get("width", 1.5)
        axis.plot(x, y, linestyle=style, drawstyle=steps, color=shade_of(plain), linewidth=width, label=label)
        label = None
    for letter in "xy":
        error = trace.get(f"error_{letter}")
        if error:
            reach: dict[str, Any] = {f"{letter}err": _reach(error)}
            axis.errorbar(x, y, **reach, fmt="none", ecolor=shade_of(plain), elinewidth=0.7, capsize=1.5)
    if "markers" in mode:
        _dots(axis, x, y, marker, label)
    if "text" in mode:
        _names(axis, x, y, trace)


def _dots(axis: Axes, x: np.ndarray, y: np.ndarray, marker: dict[str, Any], label: str | None) -> None:
    shade, sizes = marker.get("color"), np.broadcast_to(_values(marker.get("size", 6)) ** 2 * 0.4, x.shape)
    symbols = np.broadcast_to(np.asarray(marker.get("symbol", "circle"), dtype=object), x.shape)
    angles = np.broadcast_to(_values(marker.get("angle", 0)), x.shape)
    scaled = not (shade is None or isinstance(shade, str) or (len(shade) and isinstance(shade[0], str)))
    colours: Any = _values(shade) if scaled else shades_of(GREY if shade is None else shade, len(x))
    shown: dict[str, Any] = {"cmap": map_of(marker.get("colorscale")), "norm": _norm(colours, marker)} if scaled else {}
    drawn = None
    for symbol, angle in dict.fromkeys(zip(symbols, angles, strict=True)):
        of = (symbols == symbol) & (angles == angle)
        style = MarkerStyle(_MARKERS.get(str(symbol).removesuffix("-open"), "o")).rotated(deg=-angle)  # plotly turns clockwise
        own = colours[of] if scaled else [each for each, chosen in zip(colours, of, strict=True) if chosen]
        filled = {"c": own} if not str(symbol).endswith("open") else {"facecolors": "none", "edgecolors": own}
        drawn = axis.scatter(x[of], y[of], s=sizes[of], marker=style, linewidths=0.7, label=label, zorder=3, **filled, **shown)
        label = None
    if scaled and marker.get("showscale") and drawn is not None:
        below = (marker.get("colorbar") or {}).get("orientation") == "h"
        _scale(axis, drawn, marker.get("colorbar") or {}, {"location": "bottom", "shrink": 0.5} if below else {})


def _norm(values: np.ndarray, marker: dict[str, Any]) -> Normalize:
    """The range of a scale of colours: one for all symbols of a trace."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0, 1)
    return Normalize(marker.get("cmin", low), marker.get("cmax", high))


def _scale(axis: Axes, drawn: Any, bar: dict[str, Any], place: dict[str, Any]) -> None:
    label = plain_text((bar.get("title") or {}).get("text", ""))
    axis.figure.colorbar(drawn, ax=axis, label=label, **{"fraction": 0.03} | place)


def _names(axis: Axes, x: np.ndarray, y: np.ndarray, trace: dict[str, Any]) -> None:
    """Words beside the dots of a trace."""
    places, align = trace.get("textposition") or "middle center", {1: "bottom", -1: "top", 0: "center"}
    places = [places] * len(x) if isinstance(places, str) else places
    size = max(3.0, min(5.0, 85 / max(len(x), 1)))
    for words, across, height, place in zip(trace["text"], x, y, places, strict=True):
        up = 1 if "top" in place else -1 if "bottom" in place else 0
        aside: dict[str, Any] = {"xytext": (0, 6 * up), "textcoords": "offset points", "ha": "center", "va": align[up]}
        axis.annotate(plain_text(words), (across, height), fontsize=size, zorder=4, **aside)


def _bars(axis: Axes, trace: dict[str, Any], layout: dict[str, Any], below: dict[Any, Any], k: int) -> None:
    shade, name = shades_of((trace.get("marker") or {}).get("color", GREY), len(trace["x"])), plain_text(trace.get("name") or "")
    if trace.get("orientation") == "h":
        place, size = _values(trace["y"]), _values(trace["x"])
        start = below.get("left", np.zeros(len(size)))
        axis.barh(place, size, left=start, height=0.75, color=shade, label=name or None)
        below["left"] = start + size
        return
    words = list(trace["x"]) if not isinstance(trace["x"], dict) and len(trace["x"]) and isinstance(trace["x"][0], str) else None
    if words is None:
        x = _values(trace["x"])
        axis.bar(x, _values(trace["y"]), np.diff(x).min() if len(x) > 1 else 0.8, color=shade, label=name or None)
        return
    every = list((layout.get("xaxis") or {}).get("categoryarray") or words)
    axis.bar([every.index(word) + 0.15 * (k - 1.5) for word in words], _values(trace["y"]), 0.15, color=shade, label=name)
    axis.set_xticks(range(len(every)), every)


def _boxes(axis: Axes, trace: dict[str, Any], layout: dict[str, Any], below: dict[Any, Any], k: int) -> None:
    keys = {"q1": "q1", "med": "median", "q3": "q3", "whislo": "lowerfence", "whishi": "upperfence"}
    columns = {own: _values(trace[name]) for own, name in keys.items()}
    found = [{own: values[row] for own, values in columns.items()} | {"fliers": []} for row in range(len(columns["med"]))]
    style = {"color": (trace.get("line") or {}).get("color", GREY), "linewidth": 0.8}
    parts: dict[str, Any] = {f"{part}props": style for part in ("box", "whisker", "cap", "median")}
    axis.bxp(
        found, positions=_values(trace["y"]), orientation="horizontal", widths=0.6, showfliers=False, manage_ticks=False, **parts
    )


def _heatmap(axis: Axes, trace: dict[str, Any], layout: dict[str, Any], below: dict[Any, Any], k: int) -> None:
    z = _values(trace["z"])
    image = axis.imshow(
        z,
        aspect="auto",
        cmap=map_of(trace.get("colorscale")),
        vmin=trace.get("zmin"),
        vmax=trace.get("zmax"),
        interpolation="nearest",
    )
    words = np.asarray(trace["text"], dtype=object) if trace.get("text") is not None else None
    if words is not None and words.size <= 1200:
        for row, column in np.ndindex(z.shape):
            red, green, blue, _ = image.cmap(image.norm(z[row, column])) if np.isfinite(z[row, column]) else (1, 1, 1, 1)
            shade = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
            axis.text(column, row, plain_text(words[row, column]), ha="center", va="center", fontsize=5, color=shade)
    if trace.get("showscale", True):
        _scale(axis, image, trace.get("colorbar") or {}, {})


def _legend(drawn: Figure, axes: np.ndarray) -> None:
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if 1 < len(handles) <= 30:
        drawn.legend(handles.values(), handles.keys(), fontsize=6, frameon=False, loc="outside right upper")


def _values(given: Any) -> np.ndarray:
    return np.asarray(given, dtype=float) if given is not None else np.empty(0)


def _reach(error: dict[str, Any]) -> np.ndarray:
    high = np.nan_to_num(_values(error["array"]))
    return np.stack([np.nan_to_num(_values(error["arrayminus"])), high]) if error.get("arrayminus") is not None else high
