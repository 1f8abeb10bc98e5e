"""Figures over many runs: values against settings, and the modules of several networks side by side."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import t

from .figures import COLOURS, plt, png, short


def intervals(values: pd.Series) -> tuple[float, float]:
    """The mean of runs and the half width of its 95 % interval, by Student's t; the width is NaN for one run."""
    finite = values[np.isfinite(values.to_numpy(float))]
    n = len(finite)
    if n < 2:
        return (float(finite.mean()) if n else np.nan), np.nan
    return float(finite.mean()), float(t.ppf(0.975, n - 1) * finite.std(ddof=1) / np.sqrt(n))


def against_settings(frame: pd.DataFrame, value: str, settings: Sequence[str], lines: str | None, base: pd.DataFrame) -> bytes:
    """One panel per setting: the mean of a value over the runs at each choice, with its 95 % interval; one line per ``lines``.

    base: a boolean frame, whether a row has the usual choice of each setting. A panel shows the rows that have it in all others.
    """
    figure, axes = plt.subplots(
        1, len(settings), figsize=(3.4 * len(settings) + 1.2, 3.2), squeeze=False, sharey=True, layout="constrained"
    )
    names = list(dict.fromkeys(frame[lines])) if lines else [value]
    for axis, setting in zip(axes.flat, settings, strict=True):
        shown = frame[base.drop(columns=setting).all(axis=1)]
        choices = sorted(shown[setting].dropna().unique(), key=lambda choice: (isinstance(choice, str), choice))
        for k, name in enumerate(names):
            rows = shown[shown[lines] == name] if lines else shown
            found = [intervals(rows.loc[rows[setting] == choice, value]) for choice in choices]
            place = np.arange(len(choices)) + 0.06 * (k - (len(names) - 1) / 2)
            mean, reach = np.array(found, dtype=float).reshape(-1, 2).T
            axis.errorbar(place, mean, yerr=np.nan_to_num(reach), fmt="-o", markersize=3.5, capsize=2, color=_colour(k), label=name)
        axis.set_xticks(range(len(choices)), [f"{c:g}" if isinstance(c, (int, float)) else short(str(c), 16) for c in choices])
        axis.set_xlabel(setting.removeprefix("trained_by.").removeprefix("model."))
    axes.flat[0].set_ylabel(value)
    if lines:
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=7)
    return png(figure)


def squares(mean: pd.DataFrame, chance: pd.DataFrame | None, label: str) -> bytes:
    """A symmetric table as coloured squares, with the value by chance below each value."""
    size = 1.6 + 0.75 * len(mean)
    figure, axis = plt.subplots(figsize=(size + 1, size), layout="constrained")
    image = axis.imshow(mean.to_numpy(float), vmin=0, vmax=1, cmap="viridis")
    axis.set_xticks(range(len(mean)), mean.columns, rotation=45, ha="right")
    axis.set_yticks(range(len(mean)), mean.index)
    for i, j in np.ndindex(mean.shape):
        value = mean.iat[i, j]
        if np.isfinite(value):
            by_chance = "" if chance is None or not np.isfinite(chance.iat[i, j]) else f"\n({chance.iat[i, j]:.2f})"
            colour = "white" if value < 0.6 else "black"
            axis.text(j, i, f"{value:.2f}{by_chance}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, label=label, shrink=0.7)
    return png(figure)


def sorted_matrices(panels: Sequence[tuple[str, np.ndarray, np.ndarray]], across: int) -> bytes:
    """Absolute associations of units, sorted by module; panels: title, (units, units), (units,) number of the module or NaN."""
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(down, across, figsize=(2.3 * across, 2.5 * down), squeeze=False, layout="constrained")
    for axis, (title, matrix, modules) in zip(axes.flat, panels, strict=False):
        order = np.argsort(np.nan_to_num(modules.astype(float), nan=np.inf), kind="stable")
        shown = np.abs(matrix[np.ix_(order, order)])
        np.fill_diagonal(shown, 0)
        axis.imshow(shown, cmap="magma", vmin=0, vmax=np.nanquantile(shown, 0.99) or 1)
        for edge in np.flatnonzero(np.diff(np.nan_to_num(modules[order].astype(float), nan=-1))):
            axis.axhline(edge + 0.5, color="white", linewidth=0.5)
            axis.axvline(edge + 0.5, color="white", linewidth=0.5)
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=7)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    return png(figure)


def _colour(k: int) -> str:
    return COLOURS[k % len(COLOURS)]
