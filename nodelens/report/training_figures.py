"""Plots of a training: loss and accuracy, units over epochs, and how early their order is settled."""

import colorsys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from nodelens.results.result import Result, values_of
from nodelens.results.training_history import history_of
from nodelens.results.trends import common_metrics, epoch_tables, trends_of

from .charts import band, line, lines_of, panels, spread
from .metric_figures import first_of
from .plot import COLOURS, Plot, colour, figure_of, menu, text, whole_ticks

_LAYERS = 16  # lines of a figure
_UNITS = 200  # lines of units


def drawings_of_training(result: Result) -> dict[str, Callable[..., Plot]]:
    """How each plot of a training is drawn, in the order of its page. result: as ``nl.load`` returns it."""
    folder, found = result.folder, dict[str, Callable[..., Plot]]()
    if folder is None or not (folder / "result.json").is_file():
        return found
    if len(history := history_of(folder)):
        found["loss"] = partial(loss, history)
    if values_of(result.units):
        found["epochs"] = lambda metric=None: over_epochs(epoch_tables(folder), metric)
        found["units_over_epochs"] = lambda metric=None, layer=None: units_over_epochs(epoch_tables(folder), metric, layer)
    if "epochs" in found and len(result.metadata["epochs_measured"]) > 1:
        found["stability"] = lambda: stability(epoch_tables(folder))
    return found


def loss(history: pd.DataFrame) -> Plot:
    """Loss and accuracy by epoch, for training and validation."""
    kinds = {_WORDS.get(kind, kind): kind for kind in (str(c).partition("/")[2] for c in history if "/" in str(c))}

    def draw(words: Any) -> list[dict[str, Any]]:
        kind = kinds[words]
        sides = [side for side in ("train", "val") if f"{side}/{kind}" in history]
        return [line(history.index, history[f"{side}/{kind}"], side, k) for k, side in enumerate(sides)]

    figure = panels(list(kinds), draw, "epoch", height=280, shared=False, axes={"x": whole_ticks(history.index)})
    return Plot("loss", "How the training went", f"Means over each epoch.{_resumed(history)}", figure, history.reset_index())


def _resumed(history: pd.DataFrame) -> str:
    """A sentence about the epochs within which the training was resumed."""
    batches = history.get("batches", pd.Series(dtype=int))
    cut = [str(epoch) for epoch, count in batches.items() if count < batches.max()]
    words = "Training was resumed within epoch {}: its means for train are over the batches after that."
    return f" {words.format(', '.join(cut))}" if cut else ""


def over_epochs(tables: Mapping[int, pd.DataFrame], metric: str | None = None) -> Plot:
    """The mean of each metric over the units of each layer, by epoch, with their quartiles. metric: the one shown first."""
    epochs = list(tables)
    names = first_of(common_metrics(tables), metric)
    parts = {epoch: table[names].groupby(level="layer", sort=False) for epoch, table in tables.items()}
    kinds = {
        how: pd.concat({epoch: _of(by, how) for epoch, by in parts.items()}, names=["epoch"]) for how in ("mean", "low", "high")
    }
    layers = list(dict.fromkeys(kinds["mean"].index.get_level_values("layer")))
    shown = spread(layers, _LAYERS)
    traces = []
    for number, name in enumerate(names):
        for k, layer in enumerate(shown):
            mean, low, high = (kinds[how].xs(layer, level="layer")[name].to_numpy() for how in ("mean", "low", "high"))
            group = {"legendgroup": text(layer), "visible": number == 0}
            traces += [band(epochs, low, high, shade=colour(k), showlegend=False, **group), line(epochs, mean, layer, k, **group)]
    each = 2 * len(shown)
    visible = [[number * each <= k < (number + 1) * each for k in range(len(traces))] for number in range(len(names))]
    menus = [menu("metric", names, visible, [{"yaxis.title.text": text(n)} for n in names])] if len(names) > 1 else []
    axes = {"xaxis": {"title": {"text": "epoch"}, **whole_ticks(epochs)}, "yaxis": {"title": {"text": text(names[0])}}}
    table = kinds["mean"].reset_index()
    return Plot("epochs", "How each layer develops", _EPOCHS, figure_of(traces, 440, **axes, updatemenus=menus), table)


def _of(by: Any, how: str) -> pd.DataFrame:
    return by.mean() if how == "mean" else by.quantile(0.25 if how == "low" else 0.75)


def units_over_epochs(tables: Mapping[int, pd.DataFrame], metric: str | None = None, layer: str | None = None) -> Plot:
    """One line per unit of a layer. metric, layer: None is the first one; the page has menus of both."""
    first = next(iter(tables.values()))
    name = first_of(common_metrics(tables), metric)[0]
    place = first_of(list(dict.fromkeys(first.index.get_level_values("layer"))), layer, "layer")[0]
    table = pd.DataFrame({epoch: each[name] for epoch, each in tables.items()}).loc[[place]]
    known = table.replace([np.inf, -np.inf], np.nan)
    ordered = known.sort_values(list(tables)[-1], kind="stable")
    shown = spread(list(ordered.index), _UNITS)
    traces = [_unit(list(tables), ordered.loc[unit], unit[1], k / max(1, len(shown) - 1)) for k, unit in enumerate(shown)]
    thick: dict[str, Any] = {
        "mode": "lines",
        "line": {"width": 4, "color": COLOURS[1]},
        "hovertemplate": "median %{y:.4g}<extra></extra>",
    }
    traces.append(line(list(tables), known.median().to_numpy(), "median", **thick))
    axes = {"xaxis": {"title": {"text": "epoch"}, **whole_ticks(tables)}, "yaxis": {"title": {"text": text(name)}}}
    figure = figure_of(traces, 440, showlegend=False, **axes)
    return Plot("units_over_epochs", f"Every unit over epochs: {place}", UNITS_OVER_EPOCHS, figure, table)


def _unit(epochs: list[int], values: pd.Series, unit: int, rank: float) -> dict[str, Any]:
    """The line of a unit, from blue for the lowest value of the last epoch to orange for the highest."""
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb((220 - 180 * rank) / 360, 0.55, 0.55))
    style: dict[str, Any] = {"mode": "lines", "line": {"width": 1, "color": f"rgba({red},{green},{blue},0.6)"}}
    hover = "%{fullData.name}<br>epoch %{x}: %{y:.4g}<extra></extra>"
    return line(epochs, values.to_numpy(float), f"unit {unit}", showlegend=False, hovertemplate=hover, **style)


def stability(tables: Mapping[int, pd.DataFrame]) -> Plot:
    """How early the ranks of units are those of the last epoch. tables: of two or more epochs."""
    ranks = trends_of(tables)["ranks"]
    means = ranks.groupby(["metric", "epoch"], sort=False)[["with_last", "top_overlap"]].mean().reset_index()
    words = {"with_last": "Spearman with the last epoch", "top_overlap": "share of the last top 10 %"}

    def draw(label: Any) -> list[dict[str, Any]]:
        return lines_of(means, "epoch", next(c for c, each in words.items() if each == label), "metric")

    figure = panels(list(words.values()), draw, "epoch", height=320, shared=False, axes={"x": whole_ticks(means["epoch"])})
    return Plot("stability", "When the order of the units is settled", _STABILITY, figure, ranks)


_WORDS = {"acc": "accuracy", "ppl": "perplexity"}  # of what is logged under a short name
_EPOCHS = "Lines are means over the units of a layer, bands reach from the lower to the upper quartile of the units."
UNITS_OVER_EPOCHS = (
    "One line per unit, blue where its last value is low and orange where it is high; of many, 200 are drawn. The thick line is "
    "the median."
)
_STABILITY = (
    "Means over layers. Left: rank correlation of the units' values with those of the last epoch. Right: share of the last epoch's "
    "top tenth that is in the top tenth already."
)
