"""Plots of a pruning sweep: curves over the share removed, the Pareto front, ranking of criteria, and fine-tuning."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from nodelens.pruning.sweep.ranking import KEY, areas, best_first, measure_of
from nodelens.pruning.sweep.ranking import curves as curve_of

from .charts import band, diagonal, dots, line
from .plot import COLOURS, GREY, Plot, colour, dash, figure_of, menu, rows_axis, rows_height, text
from .runs_figures import intervals

_COSTS = {"macs": "MACs", "params": "parameters"}


def plots_of_sweep(sweep: pd.DataFrame) -> list[Plot]:
    """The plots of a sweep. sweep: the table ``sweep.parquet``."""
    return [draw() for draw in drawings_of_sweep(sweep).values()]


def drawings_of_sweep(sweep: pd.DataFrame) -> dict[str, Callable[..., Plot]]:
    """How each plot of a sweep is drawn, by name, in the order of the page."""
    found: dict[str, Callable[..., Plot]] = {"curves": partial(curves, sweep)}
    if not (sweep["status"] == "done").any():
        return found
    if _costs(sweep):
        found["pareto"] = partial(pareto, sweep)
    found["ranking"] = partial(ranking, sweep)
    if len(_finetuned(sweep)):
        found["recovery"] = partial(recovery, sweep)
    return found


def curves(sweep: pd.DataFrame) -> Plot:
    """Accuracy or perplexity against the share removed, a line per criterion; a menu has the other combinations."""
    measure = measure_of(sweep)
    found, order = curve_of(sweep), areas(sweep)["area"]
    best = _ordered(order, measure)
    ways = list(dict.fromkeys(key[1:] for key in order.index))
    dense = float(sweep[f"dense_{measure}"].iloc[0])
    top = _top([dense, *found["mean"]])
    traces: list[dict[str, Any]] = []
    of: list[int] = []
    for place, way in enumerate(ways):
        for k, criterion in enumerate(best):
            if (criterion, *way) in order.index:
                drawn = _curve(found.loc[(criterion, *way)], dense, criterion, k, top)
                drawn[0] |= {"opacity": 1.0 if len(best) <= _CLEAR else 0.3}  # bands of many criteria cover each other
                traces += [{**trace, "visible": place == 0} for trace in drawn]
                of += [place] * len(drawn)
    labels = [", ".join(f"{name} {value}" for name, value in zip(KEY[1:], way, strict=True)) for way in ways]
    menus = [menu("sweep", labels, [[each == k for each in of] for k in range(len(ways))])] if len(ways) > 1 else []
    finite = np.isfinite([dense, *found["mean"]]).any()
    up = {"title": {"text": f"test {measure}"}, **({"type": "log"} if measure != "accuracy" and finite else {})}
    share = "MACs" if sweep["macs_share"].notna().any() else "units"
    shapes = [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": dense, "y1": dense, "line": {"color": GREY, "dash": "dot"}}]
    axes = {"xaxis": {"title": {"text": f"share of {share} removed"}}, "yaxis": up}
    figure = figure_of(traces, 460, **axes, updatemenus=menus, shapes=shapes if np.isfinite(dense) else [])
    return Plot("curves", "What each criterion costs", _CURVES, figure, found.reset_index())


def _ordered(area: pd.Series, measure: str) -> list[str]:
    """The criteria, that of the best curve first."""
    by = area.groupby(level="criterion", sort=False)
    return [str(name) for name in best_first(by.max() if measure == "accuracy" else by.min(), measure).index]


def _shade(criterion: str, k: int) -> str:
    """The colour of the k-th criterion."""
    return GREY if criterion == "random" else colour(k)


def _curve(curve: pd.DataFrame, dense: float, criterion: str, k: int, top: float) -> list[dict[str, Any]]:
    """The band and the line of one criterion, from the dense model on; values that are not finite are crosses at the top."""
    curve = curve.sort_values("saved")
    x, mean = np.concatenate([[0.0], curve["saved"]]), np.concatenate([[dense], curve["mean"]])
    spread = np.nan_to_num(np.concatenate([[0.0], curve["std"].fillna(0)]))
    mean = np.where(np.isfinite(mean), mean, np.nan)
    known = np.isfinite(mean)
    shade = _shade(criterion, k)
    style: dict[str, Any] = {"color": shade, "dash": "dash" if criterion == "random" else dash(k), "width": 1.8}
    amounts = [
        "dense",
        *(f"amount {amount:g}, {seeds:.0f} seeds" for amount, seeds in zip(curve.index, curve["seeds"], strict=True)),
    ]
    hover: dict[str, Any] = {"text": amounts, "hovertemplate": "%{text}<br>%{y:.4g} at %{x:.3f}<extra>%{fullData.name}</extra>"}
    group: dict[str, Any] = {"legendgroup": text(criterion)}
    filled = band(x[known], (mean - spread)[known], (mean + spread)[known], shade=shade, showlegend=False, **group)
    drawn = [filled, line(x, mean, criterion, k, line=style, marker={"color": shade, "size": 5}, **hover, **group)]
    if known.all():
        return drawn
    cross: dict[str, Any] = {"symbol": "x", "size": 9, "color": shade}
    words: dict[str, Any] = {"hovertemplate": "infinite or not a number<extra>%{fullData.name}</extra>", "showlegend": False}
    return [*drawn, dots(x[~known], np.full((~known).sum(), top), criterion, marker=cross, **words, **group)]


def _top(values: list[float]) -> float:
    """Where crosses are: a little above the largest finite value."""
    finite = [value for value in values if np.isfinite(value)]
    return 1.1 * max(finite) if finite else 1.0


def pareto(sweep: pd.DataFrame) -> Plot:
    """Every cell, and the front of those that no other cell beats in both cost and accuracy or perplexity."""
    measure = measure_of(sweep)
    done, costs = _scored(sweep), _costs(sweep)
    criteria = _ordered(areas(sweep)["area"], measure)
    own = criteria if len(criteria) <= len(COLOURS) else [None]  # more colours could not be told apart
    traces: list[dict[str, Any]] = []
    fronts = []
    for k, (name, words) in enumerate(costs.items()):
        front = front_of(done[name].to_numpy(float, na_value=np.nan), done[measure].to_numpy(float), lower=measure != "accuracy")
        of = [_cells(done if each is None else done[done["criterion"] == each], name, words, measure, each) for each in own]
        for place, trace in enumerate(of):
            trace["marker"] |= {"color": GREY if own == [None] else _shade(criteria[place], place)}
        style: dict[str, Any] = {"color": _FRONT, "width": 2, "shape": "hv"}
        best = of[0] | _cells(done.loc[front], name, words, measure, "Pareto front") | {"mode": "lines+markers", "line": style}
        best |= {"type": "scatter", "marker": {"color": _FRONT, "size": 6}}
        dense = dots([float(done[f"dense_{name}"].iloc[0])], [float(done[f"dense_{measure}"].iloc[0])], "dense model", marker=_STAR)
        traces += [{**trace, "visible": k == 0} for trace in (*of, best, dense)]
        fronts.append(done.loc[front, ["name", name, measure]].rename(columns={name: "cost"}).assign(of=name))
    each = len(own) + 2
    shown = [[k * each <= place < (k + 1) * each for place in range(each * len(costs))] for k in range(len(costs))]
    labels = list(costs.values())
    menus = [menu("cost", labels, shown, [{"xaxis.title.text": each} for each in labels])] if len(costs) > 1 else []
    axes = {"xaxis": {"title": {"text": labels[0]}, "rangemode": "tozero"}, "yaxis": {"title": {"text": f"test {measure}"}}}
    table = pd.concat(fronts, ignore_index=True)
    return Plot("pareto", f"The best {measure} for each cost", _PARETO, figure_of(traces, 460, **axes, updatemenus=menus), table)


def _scored(sweep: pd.DataFrame) -> pd.DataFrame:
    """The finished cells with a finite accuracy or perplexity."""
    finite = np.isfinite(sweep[measure_of(sweep)].to_numpy(float, na_value=np.nan))
    return sweep[(sweep["status"] == "done") & finite].reset_index(drop=True)


def _costs(sweep: pd.DataFrame) -> dict[str, str]:
    """{column: its words} of the costs that such cells have."""
    done = _scored(sweep)
    return {name: words for name in (*_COSTS, *latencies(sweep)) if (words := _cost_words(name)) and _known(done, name)}


def _cells(rows: pd.DataFrame, cost: str, words: str, measure: str, name: str | None) -> dict[str, Any]:
    """Dots of cells, which are chosen by a click."""
    hover = [text(cell) for cell in rows["name"]]
    x = rows[cost].to_numpy(float, na_value=np.nan)
    found = dots(x, rows[measure].to_numpy(float), name or "cells", marker={"opacity": 0.6}, text=hover, customdata=hover)
    return found | {"hovertemplate": f"%{{text}}<br>{text(words)} %{{x:.4g}}, {measure} %{{y:.4g}}<extra></extra>"}


def front_of(cost: np.ndarray, value: np.ndarray, lower: bool = False) -> list[int]:
    """The rows that no other row equals or beats in both cost (lower is better) and value, from cheap to dear."""
    gain = -value if lower else value
    best, found = -np.inf, []
    for row in np.lexsort((-gain, cost)):
        if np.isfinite(cost[row]) and gain[row] > best:
            best = gain[row]
            found.append(int(row))
    return found


def ranking(sweep: pd.DataFrame) -> Plot:
    """The area under the curve of each combination, with 95 % intervals over seeds."""
    measure = measure_of(sweep)
    every = {seed: areas(rows)["area"] for seed, rows in sweep.groupby("seed")}
    table = pd.DataFrame(every)
    table = table.loc[areas(sweep).index.intersection(table.index, sort=False)]
    found = pd.DataFrame([intervals(row) for _, row in table.iterrows()], index=table.index, columns=["area", "half_width"])
    parts = [name for name in KEY if name == "criterion" or found.index.unique(name).size > 1]
    names = [", ".join(map(str, key)) for key in found.reset_index()[parts].itertuples(index=False)][:_RANKED]
    shown = found.head(_RANKED)
    trace = dots(
        shown["area"], np.arange(len(shown)), "area", error=shown["half_width"], text=[text(n) for n in names], marker={"size": 8}
    )
    trace["hovertemplate"] = "%{text}<br>%{x:.4g}<extra></extra>"
    axis = {"title": {"text": f"mean {measure} along the curve"}}
    figure = figure_of([trace], rows_height(len(shown), 18), xaxis=axis, yaxis=rows_axis(names, ", ".join(parts), most=48))
    return Plot("ranking", "Which criterion is best", _RANKING, figure, found.reset_index())


def recovery(sweep: pd.DataFrame) -> Plot:
    """Accuracy on validation data before and after fine-tuning, of a sweep that has one."""
    known, (before, after) = _finetuned(sweep), _around(sweep)
    traces = []
    for k, (criterion, rows) in enumerate(known.groupby("criterion", sort=False)):
        hover: dict[str, Any] = {
            "text": [text(name) for name in rows["name"]],
            "hovertemplate": "%{text}<br>%{x:.4g} to %{y:.4g}<extra></extra>",
        }
        traces.append(dots(rows[before], rows[after], str(criterion), k, **hover))
    both = known[[before, after]].to_numpy(float)
    what = after.removeprefix("val_")
    axes = {
        "xaxis": {"title": {"text": f"validation {what} after pruning"}},
        "yaxis": {"title": {"text": f"validation {what} after fine-tuning"}},
    }
    table = known[["name", *KEY, "amount", "seed", before, after]]
    figure = figure_of([diagonal(both.min(), both.max()), *traces], 440, **axes)
    return Plot("recovery", "What fine-tuning recovers", _RECOVERY, figure, table)


def _around(sweep: pd.DataFrame) -> tuple[str, str]:
    """The columns before and after fine-tuning."""
    of = "accuracy" if sweep.loc[sweep["status"] == "done", "val_accuracy"].notna().any() else "loss"
    return f"val_pruned_{of}", f"val_{of}"


def _finetuned(sweep: pd.DataFrame) -> pd.DataFrame:
    """The finished cells with values before and after fine-tuning; none where no value has changed."""
    columns = list(_around(sweep))
    known = sweep[sweep["status"] == "done"].dropna(subset=columns)
    return known.iloc[:0] if (known[columns[0]] == known[columns[1]]).all() else known


def kept(shares: pd.Series, cell: str) -> Plot:
    """The share of its units that each group keeps in a cell. shares: by group"""
    names = list(shares.index)
    style: dict[str, Any] = {"type": "bar", "orientation": "h", "marker": {"color": COLOURS[0]}, "textposition": "none"}
    hover: dict[str, Any] = {"text": [text(name) for name in names], "hovertemplate": "%{text}: %{x:.3f}<extra></extra>"}
    trace = {**style, **hover, "x": shares.to_numpy(float), "y": list(range(len(names)))}
    axis = {"title": {"text": "share of the units kept"}, "range": [0, 1]}
    figure = figure_of([trace], rows_height(len(names), 20, 90), xaxis=axis, yaxis=rows_axis(names, "group"))
    table = shares.rename("share").rename_axis("group").reset_index().assign(cell=cell)
    return Plot("kept", f"Units kept by group: {cell}", _KEPT, figure, table)


def latencies(sweep: pd.DataFrame) -> list[str]:
    """The columns of median latencies."""
    return [str(c) for c in sweep if str(c).startswith("latency_") and str(c).endswith("_ms")]


def _known(done: pd.DataFrame, name: str) -> bool:
    return name in done and f"dense_{name}" in done and done[name].notna().any()


def _cost_words(name: str) -> str:
    return _COSTS.get(name) or f"latency, ms ({name.removeprefix('latency_').removesuffix('_ms')})"


_CLEAR = 8  # criteria whose bands can be told apart
_RANKED = 60  # combinations in the ranking
_FRONT = "#c1272d"  # a colour that no criterion has
_STAR = {"symbol": "star", "size": 13, "color": COLOURS[4], "line": {"width": 1, "color": GREY}}
_CURVES = (
    "Test accuracy (language models: perplexity) against the share of multiply-accumulates (MACs) removed. Bands are one standard "
    "deviation over seeds; the dotted line is the dense network. A cross at the top stands for a value that is infinite or not a "
    "number."
)
_PARETO = (
    "Each dot is a cell of the sweep, up to seven criteria in colours; no cheaper cell equals those on the line. Choose a dot to "
    "see its command and the units that it keeps."
)
_RANKING = (
    "Area under each curve divided by the share removed, best first: mean over seeds with 95 % intervals (Student's t). All curves "
    "are compared up to the share that every curve of a seed reaches."
)
_RECOVERY = "Each dot is a cell. Above the dotted line fine-tuning helped (below it for a loss)."
_KEPT = "Share of the units that a cell of the sweep keeps. A group is a set of units that are removed together."
