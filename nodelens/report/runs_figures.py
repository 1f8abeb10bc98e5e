"""Plots over many runs: values against settings, ranks across seeds, and the modules of several networks side by side."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t

from .charts import grid, line, spread
from .plot import Plot, figure_of, menu, names_axis, short, text
from .settings import choices_of, linked

_LAYERS, _SETTINGS, _METRICS = 12, 6, 24  # in one figure


def intervals(values: pd.Series) -> tuple[float, float]:
    """The mean of runs and the half width of its 95 % interval, by Student's t; the width is NaN for one run."""
    finite = values[np.isfinite(values.to_numpy(float))]
    n = len(finite)
    if n < 2:
        return (float(finite.mean()) if n else np.nan), np.nan
    return float(finite.mean()), float(t.ppf(0.975, n - 1) * finite.std(ddof=1) / np.sqrt(n))


def against_settings(
    frame: pd.DataFrame, values: Sequence[str], settings: Sequence[str], lines: str | None, base: pd.DataFrame
) -> Plot:
    """The mean of each value over the runs at each choice of each setting, with 95 % intervals; menus choose value and setting.

    lines: a column with one line per value, such as the layer. base: a boolean frame, whether a row has the usual choice of each
    setting; a setting is shown for the rows that have it in all others, but for those that change with it.
    """
    values, settings = list(values)[:_METRICS], list(settings)[:_SETTINGS]
    names = spread(list(dict.fromkeys(frame[lines])), _LAYERS) if lines else [""]
    traces: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    labels: list[str] = []
    layouts, shown = [], []
    for value in values:
        for setting in settings:
            first = len(traces)
            held = base.drop(columns=[setting, *linked(frame, setting, [c for c in base if c != setting])])
            inside = frame[held.all(axis=1)]
            choices = choices_of(inside[setting])
            for k, name in enumerate(names):
                own = inside[inside[lines] == name] if lines else inside
                found = [intervals(own.loc[own[setting] == choice, value]) for choice in choices]
                mean, reach = np.array(found, dtype=float).reshape(-1, 2).T
                place = np.arange(len(choices)) + 0.04 * (k - (len(names) - 1) / 2)
                traces.append(line(place, mean, name or value, k, reach, visible=not labels))
                about = {"value": value, "setting": setting, lines or "of": name or "run"}
                rows += [
                    about | {"choice": str(c), "mean": m, "half_width": h} for c, m, h in zip(choices, mean, reach, strict=True)
                ]
            labels.append(f"{value} by {_brief(setting)}" if len(values) > 1 else _brief(setting))
            words = [f"{c:g}" if isinstance(c, (int, float)) else short(c, 16) for c in choices]
            layouts.append((names_axis(words, _brief(setting)), value, first, len(traces)))
    for _, _, first, last in layouts:
        shown.append([first <= k < last for k in range(len(traces))])
    changes = [{"xaxis": axis | {"automargin": True}, "yaxis.title.text": text(value)} for axis, value, _, _ in layouts]
    menus = [menu("show", labels, shown, changes)] if len(labels) > 1 else []
    axes = {"xaxis": layouts[0][0], "yaxis": {"title": {"text": text(values[0])}}}
    figure = figure_of(traces, 400, **axes, updatemenus=menus, showlegend=lines is not None)
    name = "metrics" if len(values) > 1 else values[0]
    return Plot(
        name, f"{'Metrics' if len(values) > 1 else values[0].capitalize()} against the settings", MEANS, figure, pd.DataFrame(rows)
    )


def rank_stability(frame: pd.DataFrame, metrics: Sequence[str], groups: Sequence[str], of: str) -> pd.DataFrame:
    """Mean Spearman correlation between runs that differ in the seed alone: metrics as columns, one row per layer or ``all``.

    frame: one row per run and item. groups: columns in which the compared runs are equal; of: ``unit`` compares the units of each
    layer, which have to be of the same network; ``layer`` compares the layers by their means.
    """
    found: dict[Any, dict[str, list[float]]] = {}
    for _, rows in frame.groupby(list(groups), sort=False, dropna=False) if groups else [((), frame)]:
        for layer, own in rows.groupby("layer", sort=False) if of == "unit" else [("all", rows)]:
            for metric in metrics:
                table = own.pivot_table(index=of, columns="run", values=metric, sort=False)
                found.setdefault(layer, {}).setdefault(metric, []).append(_mean_correlation(table))
    with np.errstate(all="ignore"):
        means = {layer: {m: _mean(values) for m, values in by.items()} for layer, by in found.items()}
    return pd.DataFrame(means).T.rename_axis("layer")


def stability(table: pd.DataFrame, of: str) -> Plot:
    """Ranks across seeds, as a heatmap."""
    words = table.map(lambda v: "" if np.isnan(v) else f"{v:.2f}") if table.shape[1] <= 24 else None
    figure = grid(table, "Spearman correlation", words=words, limits=(-1, 1), diverging=True)
    figure.update_layout(xaxis_tickangle=-45, height=figure.layout.height + 50)
    return Plot("ranks", f"Do other seeds rank the {of}s alike?", _RANKS[of], figure, table)


def _mean_correlation(table: pd.DataFrame) -> float:
    """Mean Spearman correlation over pairs of columns; NaN for one column, and where none varies."""
    known = table.dropna(axis=1, how="all").dropna()
    if known.shape[1] < 2 or len(known) < 2:
        return float("nan")
    ranks = known.rank().to_numpy()
    ranks = ranks[:, ranks.std(0) > 0]
    if ranks.shape[1] < 2:
        return float("nan")
    matrix = np.corrcoef(ranks.T)
    return float(matrix[np.triu_indices(len(matrix), 1)].mean())


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if value == value]
    return float(np.mean(known)) if known else float("nan")


def _brief(setting: str) -> str:
    return setting.removeprefix("trained_by.").removeprefix("model.")


MEANS = (
    "Means over runs with 95 % intervals (Student's t); the other settings have their most frequent choice, or change with "
    "this one."
)
_RANKS = {
    "unit": (
        "Mean Spearman correlation of the units' values between runs on the same weights that differ in the seed alone. 1: same "
        "order."
    ),
    "layer": (
        "Mean Spearman correlation of the layers' means between runs that differ in the seed alone. Networks trained with other "
        "seeds have other units, so layers are compared, not units."
    ),
}
