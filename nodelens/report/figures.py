"""Figures of metrics and pruning sweeps, as PNG bytes."""

import io
import warnings
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from nodelens.pruning.sweep.ranking import areas, best_first, measure_of
from nodelens.pruning.sweep.ranking import curves as curve_of
from nodelens.results.result import Result, values_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#2f6db3", "#d1632e", "#3a8f4c", "#8a4fa8", "#b08a1d", "#c43d62", "#2a9d9d", "#5c6470")
plt.rcParams.update(
    {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 9,
        "axes.edgecolor": "#9aa2ad",
        "figure.dpi": 130,
    }
)


def distributions(result: Result) -> bytes:
    """Distribution over units: one panel per metric, one box per layer."""
    columns = values_of(result.units)
    names = list(dict.fromkeys(result.units.index.get_level_values("layer")))
    across = min(3, max(1, len(columns)))
    down = -(-len(columns) // across)
    figure, axes = plt.subplots(
        down,
        across,
        figsize=(4.2 * across, 1.1 * down + 0.17 * down * len(names)),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    by_layer = dict(list(result.units.groupby(level="layer", sort=False)))
    for k, column in enumerate(columns):
        axis = axes.flat[k]
        values = [v[np.isfinite(v)] for v in (by_layer[n][column].to_numpy(float) for n in names)]
        axis.boxplot(
            values,
            orientation="horizontal",
            widths=0.6,
            flierprops={"markersize": 1.5, "markeredgecolor": "#9aa2ad"},
            medianprops={"color": COLOURS[1]},
            boxprops={"color": COLOURS[0]},
            whiskerprops={"color": "#9aa2ad"},
            capprops={"color": "#9aa2ad"},
        )
        axis.set_title(column)
        axis.set_yticks(range(1, len(names) + 1), [short(n) for n in names])
        spread = np.unique(np.concatenate(values)) if values else np.empty(0)
        if len(spread) == 1:  # automatic ticks would suggest a range
            axis.set_xticks(spread)
    axes.flat[0].invert_yaxis()
    for axis in list(axes.flat)[len(columns) :]:
        axis.remove()
    return png(figure)


def agreement(result: Result) -> bytes:
    """Matrix of rank correlations between metrics."""
    columns = values_of(result.units)
    total, weight = np.zeros((len(columns),) * 2), np.zeros((len(columns),) * 2)
    for _, rows in result.units[columns].groupby(level="layer", sort=False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # constant metrics have no rank correlation
            found = rows.rank().corr().to_numpy()
        known = np.isfinite(found)
        total[known] += found[known] * len(rows)
        weight[known] += len(rows)
    mean = np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)
    size = 1.5 + 0.55 * len(columns)
    figure, axis = plt.subplots(figsize=(size + 1, size), layout="constrained")
    axis.set_facecolor("#eceff2")
    image = axis.imshow(mean, vmin=-1, vmax=1, cmap="RdBu_r")
    axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axis.set_yticks(range(len(columns)), columns)
    for i, j in np.ndindex(mean.shape):
        if np.isfinite(mean[i, j]):
            colour = "white" if abs(mean[i, j]) > 0.6 else "black"
            axis.text(j, i, f"{mean[i, j]:.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, label="Spearman correlation", shrink=0.7)
    return png(figure)


def layers(result: Result) -> bytes:
    """Metrics of layers with standard errors, one panel per metric."""
    names = [f"{short(str(n))} ({u})" for n, u in result.layers["units"].items()]
    return _dots(result.layers, names)


def edges(result: Result) -> bytes:
    """Metrics of layer pairs with standard errors, one panel per metric."""
    return _dots(result.edges, [f"{short(str(a), 20)} \u2192 {short(str(b), 20)}" for a, b in result.edges.index])


def _dots(table: pd.DataFrame, names: list[str]) -> bytes:
    columns = [c for c in values_of(table) if table[c].notna().any()]  # no empty panels
    across = min(4, max(1, len(columns)))
    down = -(-len(columns) // across)
    figure, axes = plt.subplots(
        down,
        across,
        figsize=(3.4 * across, (1.0 + 0.2 * len(names)) * down),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    place = np.arange(len(names))
    for axis, column in zip(axes.flat, columns, strict=False):
        error = table.get(f"{column}_se")
        value = table[column].where(np.isfinite(table[column]))
        axis.errorbar(value, place, xerr=error, fmt="o", markersize=4, color=COLOURS[0], capsize=2)
        axis.set_title(column)
        axis.set_yticks(place, names)
    axes.flat[0].set_ylim(len(names) - 0.4, -0.6)
    for axis in list(axes.flat)[len(columns) :]:
        axis.remove()
    return png(figure)


def curves(sweep: pd.DataFrame) -> bytes:
    """Accuracy or perplexity against the share of MACs removed: a line per criterion, a panel per allocation and compensation."""
    found, order = curve_of(sweep), areas(sweep)["area"]
    ways = [list(dict.fromkeys(sweep[k])) for k in ("allocation", "compensate", "mode")]
    down, across = len(ways[0]) * len(ways[2]), len(ways[1])
    measure = measure_of(sweep)
    by = order.groupby(level="criterion", sort=False)
    best = best_first(by.max() if measure == "accuracy" else by.min(), measure).index
    figure, axes = plt.subplots(
        down,
        across,
        figsize=(max(5.0, 3.3 * across) + 1.7, 3.1 * down + 0.3),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    dense = sweep[f"dense_{measure}"].iloc[0]
    for row, (allocation, mode) in enumerate((a, m) for a in ways[0] for m in ways[2]):
        for column, compensate in enumerate(ways[1]):
            axis = axes[row, column]
            if np.isfinite(dense):
                axis.axhline(dense, color="#9aa2ad", linewidth=1, linestyle=":")
            for k, criterion in enumerate(best):
                if (criterion, allocation, compensate, mode) in order.index:
                    _curve(axis, found.loc[(criterion, allocation, compensate, mode)], dense, str(criterion), k)
            axis.set_title(", ".join([f"{allocation}, compensate {compensate}", *([mode] if len(ways[2]) > 1 else [])]))
            if measure == "accuracy":
                axis.set_ylim(0, 1.02)
            elif np.isfinite([dense, *found["mean"]]).any():
                axis.set_yscale("log")
    for axis in axes[-1]:
        axis.set_xlabel("share of MACs removed" if sweep["macs_share"].notna().any() else "share of units removed")
    for axis in axes[:, 0]:
        axis.set_ylabel(f"test {measure}")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, title="criterion, best area first", fontsize=8, loc="outside right upper", frameon=False)
    return png(figure)


def _curve(axis: plt.Axes, curve: pd.DataFrame, dense: float, criterion: str, k: int) -> None:
    """The line of one criterion, starting at the dense model, with a band of one standard deviation over seeds."""
    curve = curve.sort_values("saved")
    x, mean = np.concatenate([[0.0], curve["saved"]]), np.concatenate([[dense], curve["mean"]])
    spread = np.concatenate([[0.0], curve["std"].fillna(0)])
    chance = criterion == "random"
    style: dict[str, Any] = {"color": "#1c1f24" if chance else COLOURS[k % len(COLOURS)]}
    dash: Any = "--" if chance else ("-", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))[k // len(COLOURS) % 4]
    known = np.isfinite(mean)
    beyond, mean, spread = x[~known], np.where(known, mean, np.nan), np.where(known & np.isfinite(spread), spread, 0)
    axis.plot(x, mean, marker="o", markersize=2.5, linewidth=1.2, linestyle=dash, label=criterion, **style)
    axis.plot(beyond, np.full(len(beyond), 0.98), "x", markersize=5, transform=axis.get_xaxis_transform(), **style)
    axis.fill_between(x, mean - spread, mean + spread, alpha=0.15, linewidth=0, **style)


def short(name: str, most: int = 40) -> str:
    """A long name shortened to its end, cut at a dot."""
    while len(name) > most and "." in name.lstrip("\u2026"):
        name = "\u2026" + name.lstrip("\u2026").split(".", 1)[1]
    return name if len(name) <= most else "\u2026" + name[-most + 1 :]


def png(figure: plt.Figure) -> bytes:
    """The PNG bytes of a figure; closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()
