"""A plot of a page: a plotly figure with its title, what to see in it, and the data behind it."""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Okabe & Ito, Color Universal Design (2008), without yellow, which is too light on white
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a8088")
GREY = "#9aa2ad"
FORMATS = ("png", "svg", "pdf")  # of a figure for a paper
SEQUENTIAL = "Cividis"  # Nunez, Anderton & Renslow 2018: read alike with and without colour-blindness
DIVERGING = "RdBu_r"
_AXIS = {"automargin": True, "gridcolor": "rgba(128,136,148,0.25)", "zerolinecolor": "rgba(128,136,148,0.5)"}
_TEMPLATE = {
    "layout": {
        "colorway": list(COLOURS),
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "margin": {"l": 60, "r": 20, "t": 14, "b": 50},
        "hovermode": "closest",
    }
}
_TICKS = 60  # labels that an axis of names shows


@dataclass(frozen=True)
class Plot:
    """A figure of a page.

    name: of its files; title: what it shows; caption: how to read it; figure: a ``plotly.graph_objects.Figure``; table: the data
    behind it, which the page and an export offer as CSV.
    """

    name: str
    title: str
    caption: str
    figure: "Figure"
    table: pd.DataFrame = field(default_factory=pd.DataFrame)


def figure_of(traces: Sequence[Mapping[str, Any]], height: int = 380, **layout: Any) -> "Figure":
    """A plotly figure of traces and layout, in the style of the report. plotly is imported when the first figure is made."""
    from plotly.graph_objects import Figure

    for axis in (value for name, value in layout.items() if name[1:5] == "axis" and value.get("type") == "log"):
        axis.setdefault("nticks", 4)  # more would label each ninth of a decade
    return Figure([dict(trace) for trace in traces], {"template": _TEMPLATE, "height": height, **layout})


def text(value: object) -> str:
    """A name as plotly shows it. plotly reads a few HTML tags in texts, and fills in values such as %{x}: names have neither."""
    return html.escape(str(value), quote=False).replace("%{", "&#37;{")


def short(name: object, most: int = 40) -> str:
    """A long name shortened: of a path the end is kept, cut at a dot; of other names, such as those of metrics, both ends."""
    name = str(name)
    while len(name) > most and "." in name.lstrip("…"):
        name = "…" + name.lstrip("…").split(".", 1)[1]
    if len(name) <= most:
        return name
    head = 0 if name.startswith("…") else (most - 1) // 2
    return name[:head] + "…" + name[len(name) - most + 1 + head :]


def names_axis(names: Sequence[object], title: str = "", most: int = 32, **more: Any) -> dict[str, Any]:
    """An axis of names at 0, 1, 2 ..., so that two names that are shortened alike stay apart. Of many names some are shown."""
    step = max(1, -(-len(names) // _TICKS))
    shown = range(0, len(names), step)
    ticks = {"tickvals": list(shown), "ticktext": [text(short(names[k], most)) for k in shown]}
    return {"title": {"text": title, "standoff": 14}, "range": [-0.6, len(names) - 0.4], "zeroline": False, **ticks, **more}


def rows_axis(names: Sequence[object], title: str = "", most: int = 32, **more: Any) -> dict[str, Any]:
    """An axis of names from top to bottom."""
    return names_axis(names, title, most, range=[len(names) - 0.4, -0.6], **more)


def whole_ticks(values: Iterable[int]) -> dict[str, Any]:
    """Ticks at whole numbers, such as epochs, at most eleven."""
    held = [int(value) for value in values]
    if not held:
        return {}
    first, last = min(held), max(held)
    step = next(size * 10**power for power in range(19) for size in (1, 2, 5) if (last - first) / (size * 10**power) <= 10)
    shown = list(range(-(-first // step) * step, last + 1, step))
    return {"tickvals": shown, "ticktext": [f"{value}" for value in shown]}


def rows_height(count: int, per_row: int = 22, around: int = 110, most: int = 900) -> int:
    """The height of a figure with so many rows, in pixels."""
    return int(min(most, max(260, around + per_row * count)))


def menu(
    name: str,
    choices: Sequence[str],
    visible: Sequence[Sequence[bool]],
    layouts: Sequence[Mapping[str, Any]] = (),
    notes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A menu that shows other traces of a figure. A page shows it as a select box.

    name: what is chosen; choices: the labels; visible: for each, which traces it shows; layouts: for each, what changes in the
    layout; notes: {label: what a page says below the menu when it is chosen}
    """
    changes = layouts or [{}] * len(choices)
    buttons = [
        {
            "label": text(label),
            "method": "update",
            "args": [{"visible": list(shown)}, dict(change)],
            "name": (notes or {}).get(label, ""),
        }
        for label, shown, change in zip(choices, visible, changes, strict=True)
    ]
    return {"name": name, "buttons": buttons, "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "showactive": True}


def one_of(
    name: str,
    traces: list[dict[str, Any]],
    choices: Sequence[str],
    layouts: Sequence[Mapping[str, Any]] = (),
    notes: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """The menus of a figure that shows one trace of several; hides all but the first."""
    for k, trace in enumerate(traces):
        trace["visible"] = k == 0
    return [menu(name, choices, np.eye(len(traces), dtype=bool).tolist(), layouts, notes)] if len(traces) > 1 else []


def colour(k: int) -> str:
    """The k-th colour; after seven they repeat."""
    return COLOURS[k % len(COLOURS)]


def dash(k: int) -> str:
    """The dash of the k-th line, which changes where colours repeat."""
    return ("solid", "dash", "dot", "dashdot")[k // len(COLOURS) % 4]


def shade(k: int, n: int) -> str:
    """The colour of the k-th of n layers, from dark to bright with depth."""
    from plotly.colors import sample_colorscale

    return str(sample_colorscale("Viridis", [0.9 * k / max(n - 1, 1)])[0])
