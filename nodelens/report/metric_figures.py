"""Plots of what a pass measured: units, layers and pairs of layers."""

import warnings
from typing import Any

import numpy as np
import pandas as pd

from nodelens.messages import listed, nearest
from nodelens.results.result import BESIDE, Result, values_of

from .charts import box, boxes, dots, grid, heat, spread
from .definitions import definitions_of, label
from .plot import COLOURS, Plot, figure_of, menu, names_axis, one_of, rows_axis, rows_height, shade, short, text


def overview(result: Result) -> Plot:
    """Layers against metrics, coloured by the rank of the layer within the metric."""
    found = comparable(result)
    ranks = (found.rank() - 1) / (found.notna().sum() - 1).clip(lower=1)
    trace = heat(ranks.to_numpy(float), "rank", 0, 1)
    layers, columns = [text(name) for name in found.index], [text(name) for name in found.columns]
    trace["customdata"] = [
        [f"{layer}<br>{column} {value:.4g}" for column, value in zip(columns, row, strict=True)]
        for layer, row in zip(layers, found.to_numpy(float), strict=True)
    ]
    trace["hovertemplate"] = "%{customdata}<br>rank %{z:.2f}<extra></extra>"
    axis = names_axis(list(found.columns), most=26, tickangle=-45)
    rows = rows_axis(list(found.index), "layer")
    figure = figure_of([trace], rows_height(len(found), 20, 190), xaxis=axis, yaxis=rows, meta={"least": 170 + 16 * len(columns)})
    return Plot("overview", "Which layers are high and low in each metric", _OVERVIEW, figure, found)


def comparable(result: Result) -> pd.DataFrame:
    """The means of layers, of the metrics that two or more layers have: one value alone is neither high nor low."""
    found = means_of_layers(result)
    return found.loc[:, found.notna().sum() > 1]


def means_of_layers(result: Result) -> pd.DataFrame:
    """One row per layer: the mean over units of each metric of units, and the metrics of layers."""
    units = result.units[values_of(result.units)]
    means = units.replace([np.inf, -np.inf], np.nan).groupby(level="layer", sort=False).mean()
    return means.join(result.layers[layer_metrics(result)]) if len(means.columns) else result.layers[layer_metrics(result)]


def layer_metrics(result: Result) -> list[str]:
    """The metrics of layers that have a value."""
    return [c for c in values_of(result.layers) if result.layers[c].notna().any()]


def distributions(result: Result, metric: str | None = None) -> Plot:
    """The distribution of a metric over the units of each layer; one metric is shown, the others are in a menu."""
    columns = first_of(values_of(result.units), metric)
    by_layer = dict(list(result.units.groupby(level="layer", sort=False)))
    traces, tables, layouts = [], [], []
    for name in columns:
        found = [box(rows[name], k) for k, rows in enumerate(by_layer.values())]
        tables.append(_quartiles(list(by_layer), found, name))
        mean = [rows[name].replace([np.inf, -np.inf], np.nan).mean() for rows in by_layer.values()]
        error = [_typical(rows.get(f"{name}_se")) for rows in by_layer.values()]
        tables[-1]["mean"], tables[-1]["standard_error_of_a_unit"] = mean, error
        traces.append(boxes(found, name))
        marker = {"symbol": "diamond", "size": 7, "color": COLOURS[1]}
        hover = [text(layer) for layer in by_layer]
        traces.append(dots(mean, list(range(len(mean))), "mean", error=error, marker=marker, text=hover, showlegend=False))
        traces[-1]["hovertemplate"] = "%{text}<br>mean %{x:.4g}<extra></extra>"
        layouts.append({"xaxis.title.text": text(label(result, name))})
    visible = [[k // 2 == one for k in range(len(traces))] for one in range(len(columns))]
    for trace, shown in zip(traces, visible[0] if visible else [], strict=False):
        trace["visible"] = shown
    menus = [menu("metric", columns, visible, layouts, definitions_of(result))] if len(columns) > 1 else []
    axis = {"title": {"text": text(label(result, columns[0])) if columns else ""}, "showgrid": True}
    up = rows_axis(list(by_layer), "layer")
    figure = figure_of(traces, rows_height(len(by_layer), 26), xaxis=axis, yaxis=up, updatemenus=menus)
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    return Plot("units", "How each metric is spread over the units of a layer", _UNITS, figure, table)


def agreement(result: Result) -> Plot:
    """Rank correlations between the metrics of units, of which there are two or more."""
    columns = values_of(result.units)
    total, weight = np.zeros((len(columns),) * 2), np.zeros((len(columns),) * 2)
    for _, rows in result.units[columns].groupby(level="layer", sort=False):
        with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
            warnings.simplefilter("ignore", RuntimeWarning)  # constant metrics have no rank correlation
            found = rows.rank().corr().to_numpy()
        known = np.isfinite(found)
        total[known] += found[known] * len(rows)
        weight[known] += len(rows)
    mean = np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)
    table = pd.DataFrame(mean, pd.Index(columns, name="metric"), columns)
    words = table.map(lambda v: "" if np.isnan(v) else f"{v:.2f}").replace("-0.00", "0.00") if len(columns) <= 24 else None
    figure = grid(table, "Spearman correlation", y="", words=words, most=26, limits=(-1, 1), diverging=True)
    figure.update_layout(
        height=max(290, rows_height(len(columns), 30, 150)), xaxis_tickangle=-45, meta={"least": 200 + 16 * len(columns)}
    )
    return Plot("agreement", "Which metrics rank units alike", _AGREEMENT, figure, table)


def layers(result: Result, metric: str | None = None) -> Plot:
    """Metrics of layers with standard errors."""
    columns = first_of(layer_metrics(result), metric)
    names = [f"{name} ({units})" for name, units in result.layers["units"].items()] if "units" in result.layers else None
    figure = _dots(result, result.layers, columns, names or list(result.layers.index), "layer (units)" if names else "layer")
    return Plot("layers", "How the layers differ in each metric", _LAYERS, figure, _with_errors(result.layers, columns))


def edges(result: Result, metric: str | None = None) -> Plot:
    """Metrics of pairs of layers with standard errors."""
    columns = first_of([c for c in values_of(result.edges) if result.edges[c].notna().any()], metric)
    figure = _dots(result, result.edges, columns, [f"{a} → {b}" for a, b in result.edges.index], "pair of layers")
    brief = [f"{short(a, 24)} → {short(b, 24)}" for a, b in result.edges.index]
    figure.update_layout(yaxis=rows_axis(brief, "pair of layers", most=51))
    return Plot("pairs", "How the pairs of layers differ in each metric", _EDGES, figure, _with_errors(result.edges, columns))


def _dots(result: Result, table: pd.DataFrame, columns: list[str], names: list[Any], rows: str) -> Any:
    traces, labels = [], [text(label(result, column)) for column in columns]
    for column in columns:
        value = table[column].where(np.isfinite(table[column]))
        traces.append(dots(value, list(range(len(table))), column, error=table.get(f"{column}_se"), showlegend=False))
        traces[-1] |= {"text": [text(name) for name in names], "hovertemplate": "%{text}<br>%{x:.4g}<extra></extra>"}
    menus = one_of("metric", traces, columns, [{"xaxis.title.text": words} for words in labels], definitions_of(result))
    axis = {"title": {"text": labels[0]}}
    return figure_of(traces, rows_height(len(table)), xaxis=axis, yaxis=rows_axis(names, rows), updatemenus=menus)


def _with_errors(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    return table[[each for column in columns for each in (column, f"{column}_se") if each in table]]


def first_of(names: list[str], chosen: str | None, what: str = "metric") -> list[str]:
    """The names, with a chosen one in front. Raises ValueError if it is not among them. what: they are names of."""
    if chosen is None:
        return names
    if chosen not in names:
        raise ValueError(f"no {what} {chosen!r} to plot.{nearest(chosen, names)} There are {listed(names, _LISTED)}")
    return [chosen, *(name for name in names if name != chosen)]


def _typical(errors: pd.Series | None) -> float:
    """The root of the mean squared standard error; NaN without errors."""
    return float("nan") if errors is None else float(np.sqrt((errors**2).mean()))


def _quartiles(names: list[str], found: list[dict[str, float] | None], metric: str) -> pd.DataFrame:
    keys = ("q1", "median", "q3", "lowerfence", "upperfence")
    rows = [
        {"layer": name, "metric": metric, **{k: each[k] if each else np.nan for k in keys}}
        for name, each in zip(names, found, strict=True)
    ]
    return pd.DataFrame(rows)


def spectra(result: Result) -> list[str]:
    """The metrics that keep values per input feature beside the tables, such as singular values."""
    found = (name for (_, name), values in result.matrices.items() if values.ndim == 1 and not name.endswith(BESIDE))
    return list(dict.fromkeys(found))


def spectrum(result: Result, name: str) -> Plot:
    """Values per input feature: one line per layer."""
    lines = {layer: values for (layer, each), values in result.matrices.items() if each == name and values.ndim == 1}
    return Plot(f"spectrum-{name}", f"How fast {name} fall off in each layer", _SPECTRA, curves(lines, name), longest(lines))


def curves(lines: dict[str, np.ndarray], label: str, most: int = 60, points: int = 200) -> Any:
    """Sorted values on logarithmic axes; of many layers some, of many values some, evenly spaced in the logarithm of the rank."""
    chosen = spread(list(lines), most)
    traces = []
    for k, layer in enumerate(chosen):
        values = np.sort(np.asarray(lines[layer], dtype=float))[::-1]
        values = values[np.isfinite(values) & (values > 0)]
        at: Any = np.unique(np.geomspace(1, max(1, len(values)), points).round().astype(int)) - 1 if len(values) else []
        style: dict[str, Any] = {
            "line": {"color": shade(k, len(chosen)), "width": 1.2},
            "hovertemplate": "%{x}: %{y:.3g}<extra>%{fullData.name}</extra>",
        }
        traces.append({"type": "scatter", "mode": "lines", "x": np.asarray(at) + 1, "y": values[at], "name": text(layer), **style})
    return figure_of(
        traces, 420, xaxis={"type": "log", "title": {"text": "rank"}}, yaxis={"type": "log", "title": {"text": text(label)}}
    )


def longest(lines: dict[str, np.ndarray], most: int = 20_000) -> pd.DataFrame:
    """Values by layer and rank, without those beyond so many rows."""
    rows = [
        pd.DataFrame({"layer": layer, "rank": np.arange(1, len(v) + 1), "value": np.sort(v)[::-1]}) for layer, v in lines.items()
    ]
    return pd.concat(rows, ignore_index=True).head(most) if rows else pd.DataFrame()


_LISTED = 20  # names in an error
_OVERVIEW = (
    "Each column ranks the layers by one metric, from 0 (lowest) to 1 (highest): means over units of metrics of units, and metrics "
    "of layers. The pointer shows the value."
)
_UNITS = (
    "Boxes show the quartiles over units, whiskers reach 1.5 interquartile ranges. The diamond is the mean over units; its bar is "
    "the typical standard error of one unit (root mean square), where errors are known."
)
_AGREEMENT = (
    "Spearman correlation between metrics over the units of a layer, averaged over layers with the number of units as weights; "
    "empty where a metric is constant."
)
_LAYERS = "Bars are one jackknife standard error; the number of units is in parentheses."
_EDGES = (
    "Bars are one jackknife standard error. Rows are positions if both layers have the same, else samples (means over positions)."
)
_SPECTRA = "One value per input feature of a layer, largest first, on logarithmic axes. Dark lines are early layers."
