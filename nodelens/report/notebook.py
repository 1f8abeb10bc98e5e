"""``result.plot``: the figures of the page in a notebook."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from nodelens.messages import nearest
from nodelens.results.result import Result, values_of

from . import metric_figures as figures
from .analysis_plots import kind_of, plots_of
from .charts import dots
from .definitions import label
from .page import plots_of_result
from .plot import Plot, figure_of, text
from .unit_data import sample

_FIRST = {"units": figures.distributions, "layers": figures.layers, "pairs": figures.edges}
_MOST = 50_000  # points of a scatter


def plot(
    result: Result, kind: str, x: str | None = None, y: str | None = None, layer: str | None = None, metric: str | None = None
) -> Any:
    """The plotly figure of a result, as on its page.

    kind: ``scatter``, of the metrics x and y over the units of a layer (None: all layers); a figure of the page: overview, units,
    agreement, layers, network, pairs, spectrum-<name>; or an analysis and one of its figures, such as ``clusters.composition``.
    metric: which one units, layers and pairs show first

    The data behind the figure are in ``figure._table``. Raises ValueError for another kind or metric, and for a kind that takes no
    such option.
    """
    if kind == "scatter":
        _only(kind, {"metric": metric})
        return finished(scatter(result, x, y, layer))
    _only(kind, {"x": x, "y": y, "layer": layer} | ({} if kind in _FIRST else {"metric": metric}))
    if metric is not None:
        return finished(_FIRST[kind](result, metric))
    analysis, _, name = kind.partition(".")
    if analysis in result.analyses:
        return chosen(result.analyses[analysis], name, analysis)
    found = {each.name: each for each in plots_of_result(result)}
    if kind not in found:
        known = [*(["scatter"] if values_of(result.units) else []), *found, *result.analyses]
        raise ValueError(f"this result has no plot {kind!r}.{nearest(kind, known)} It has {', '.join(known) or 'none'}")
    return finished(found[kind])


def chosen(found: Any, name: str | None = None, kind: str = "") -> Any:
    """A figure of an analysis by name; the first one without a name. Raises ValueError for another name."""
    plots = {each.name: each for each in plots_of(found)}
    kind = kind or kind_of(found)
    if not plots:
        raise ValueError(f"{kind} has no figures: its tables are in tables()")
    name = name or next(iter(plots))
    if name not in plots:
        raise ValueError(f"{kind} has no figure {name!r}.{nearest(name, plots)} It has {', '.join(plots)}")
    return finished(plots[name])


def finished(plot: Plot) -> Any:
    """A plot as a figure of its own, with its title and the data behind it."""
    menus = len(plot.figure.layout.updatemenus)
    top = 56 + 36 * bool(menus) + (plot.figure.layout.margin.t or 0)
    plot.figure.update_layout(
        title={"text": text(plot.title), "font": {"size": 15}, "y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 12}}
    )
    plot.figure.update_layout(margin={"t": top}, height=plot.figure.layout.height + top)
    plot.figure._table = plot.table  # an attribute, as plotly has no place for it
    return plot.figure


def scatter(result: Result, x: str | None = None, y: str | None = None, layer: str | None = None) -> Plot:
    """Two metrics of units against each other, one colour per layer."""
    metrics = values_of(result.units)
    if len(metrics) < 1:
        raise ValueError("this result has no metric of units to plot")
    x, y = x or metrics[0], y or metrics[min(1, len(metrics) - 1)]
    for name in (x, y):
        if name not in metrics:
            raise ValueError(f"no metric {name!r} to plot.{nearest(name, metrics)} There are {', '.join(metrics)}")
    table = result.units[list(dict.fromkeys([x, y]))]
    layers = list(dict.fromkeys(table.index.get_level_values("layer")))
    if layer is not None and layer not in layers:
        raise ValueError(f"no layer {layer!r} to plot.{nearest(layer, layers)} There are {', '.join(map(str, layers[:20]))}")
    table = table if layer is None else table.loc[[layer]]
    shown = table if len(table) <= _MOST else sample(table, _MOST)
    traces = [_dots(rows, x, y, str(name), k) for k, (name, rows) in enumerate(shown.groupby(level="layer", sort=False))]
    axes = {f"{axis}axis": {"title": {"text": text(label(result, name))}} for axis, name in (("x", x), ("y", y))}
    figure = figure_of(traces, 480, **axes, showlegend=1 < len(traces) <= 40)
    return Plot("scatter", f"{y} against {x}", "One dot per unit.", figure, table)


def _dots(rows: pd.DataFrame, x: str, y: str, name: str, k: int) -> dict[str, Any]:
    units = [f"{text(name)} {unit}" for unit in rows.index.get_level_values("unit")]
    hover = {"text": units, "hovertemplate": f"%{{text}}<br>{text(x)} %{{x:.4g}}<br>{text(y)} %{{y:.4g}}<extra></extra>"}
    return dots(rows[x].to_numpy(), rows[y].to_numpy(), name, k, **hover)


def _only(kind: str, options: Mapping[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"plot({kind!r}) takes no {given[0]}: x, y and layer are of scatter; metric is of units, layers and pairs")
