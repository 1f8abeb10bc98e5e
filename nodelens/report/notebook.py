"""``result.plot``: the figures of the page in a notebook."""

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from typing import Any

import pandas as pd

from nodelens.messages import nearest
from nodelens.results.result import Result, values_of

from .analysis_plots import has_figures, kind_of, plots_of
from .charts import dots
from .definitions import label
from .metric_figures import first_of
from .page import drawings_of_result
from .plot import Plot, figure_of, text
from .pruning_page import drawings_of_pruning, numbers_of, read_sweep
from .training_figures import drawings_of_training
from .training_page import numbers_of as numbers_of_training
from .unit_data import sample

_MOST = 50_000  # points of a scatter


def plot(result: Result, kind: str | None = None, **options: Any) -> Any:
    """The plotly figure of a result, as on its page. kind, options: as for ``Result.plot``.

    The data behind the figure are in ``figure._table``. Raises ValueError for another kind, metric, layer or cell, and for a kind
    that takes no such option.
    """
    drawings = drawings_of(result)
    known = [*drawings, *_analyses(result)]
    kind = next(iter(known), "overview") if kind is None else str(kind)
    given = {name: value for name, value in options.items() if value is not None}
    analysis, _, name = kind.partition(".")
    if analysis in result.analyses:
        _check_options(kind, given, drawings)
        return chosen(result.analyses[analysis], name, analysis)
    if kind not in drawings:
        raise ValueError(f"this result has no plot {kind!r}.{nearest(kind, known)} It has {', '.join(known) or 'none'}")
    _check_options(kind, given, drawings)
    return finished(drawings[kind](**given))


def drawings_of(result: Result) -> dict[str, Callable[..., Plot]]:
    """How each plot of a result is drawn, by kind, those of its page first. The keywords are options of the kind."""
    found = drawings_of_pruning(result) | drawings_of_training(result) | drawings_of_result(result)
    return found | ({"scatter": partial(scatter, result)} if values_of(result.units) else {})


def kinds_of(result: Result) -> list[str]:
    """What ``result.plot`` draws, and the analyses whose figures it draws, as in ``clusters.composition``."""
    return [*drawings_of(result), *_analyses(result)]


def _analyses(result: Result) -> list[str]:
    """The names of analyses that are drawn."""
    return [name for name, found in result.analyses.items() if has_figures(found)]


def lines_of(result: Result) -> list[str]:
    """What a summary says about the sweep or the training behind a result, and about its plots."""
    numbers: dict[str, str] = {}
    folder = result.folder
    if folder is not None and (folder / "sweep.parquet").is_file():
        numbers = numbers_of(read_sweep(folder))
    elif (epochs := result.metadata.get("epochs_measured")) is not None:
        numbers = numbers_of_training(result.metadata["evaluation"], len(epochs))
        numbers |= {"units are those after epoch": str(epochs[-1])} if epochs else {}
    lines = ["; ".join(f"{name}: {value}" for name, value in numbers.items())] if numbers else []
    kinds = kinds_of(result)
    return [*lines, *([f"plots: {', '.join(kinds)}"] if kinds else [])]


def _check_options(kind: str, given: Mapping[str, Any], drawings: Mapping[str, Callable[..., Plot]]) -> None:
    """Raises ValueError for an option that a kind of plot does not take, and names the kinds that take it."""
    of = {each: list(signature(draw).parameters) for each, draw in drawings.items()}
    for name in given:
        if name not in of.get(kind, []):
            takes = ", ".join(each for each, options in of.items() if name in options)
            raise ValueError(
                f"plot({kind!r}) takes no {name}: {f'it is an option of {takes}' if takes else 'no plot has this option'}"
            )


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
    x, y = first_of(metrics, x)[0], first_of(metrics, y or metrics[min(1, len(metrics) - 1)])[0]
    table = result.units[list(dict.fromkeys([x, y]))]
    layers = list(dict.fromkeys(table.index.get_level_values("layer")))
    table = table if layer is None else table.loc[first_of(layers, layer, "layer")[:1]]
    shown = table if len(table) <= _MOST else sample(table, _MOST)
    traces = [_dots(rows, x, y, str(name), k) for k, (name, rows) in enumerate(shown.groupby(level="layer", sort=False))]
    axes = {f"{axis}axis": {"title": {"text": text(label(result, name))}} for axis, name in (("x", x), ("y", y))}
    figure = figure_of(traces, 480, **axes, showlegend=1 < len(traces) <= 40)
    return Plot("scatter", f"{y} against {x}", "One dot per unit.", figure, table)


def _dots(rows: pd.DataFrame, x: str, y: str, name: str, k: int) -> dict[str, Any]:
    units = [f"{text(name)} {unit}" for unit in rows.index.get_level_values("unit")]
    hover = {"text": units, "hovertemplate": f"%{{text}}<br>{text(x)} %{{x:.4g}}<br>{text(y)} %{{y:.4g}}<extra></extra>"}
    return dots(rows[x].to_numpy(), rows[y].to_numpy(), name, k, **hover)
