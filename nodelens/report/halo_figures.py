"""Figures of halos across layers, drawn from saved findings."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from nodelens.results.findings import Findings

from .clusters_figures import COLOUR_OF
from .figures import COLOURS, plt, png, short

PANELS = 9  # pairs of layers with a table of flow of their own


def figures_of(found: Findings) -> Iterator[tuple[str, bytes, str]]:
    """Name, picture and caption of each figure."""
    if not len(found["pairs"]):
        return
    yield (
        "halo",
        halo(found),
        "Share of the halo's input that comes from the cluster, and the mean and 95 % of random sets of units of the same size; "
        "filled where p <= 0.05.",
    )
    yield (
        "shares",
        shares(found),
        "Share of each unit's input that comes from the cluster; the dashed line is where the halo begins.",
    )
    yield (
        "flow",
        flow(found),
        "Share of the influence leaving a cluster (row) that enters a cluster of the next layer (column); bold where p <= 0.05.",
    )


def halo(found: Findings) -> bytes:
    """The share of the halo in each pair of layers against its baseline."""
    pairs = found["pairs"]
    figure, axis = plt.subplots(figsize=(6, 1.2 + 0.3 * len(pairs)), layout="constrained")
    place = np.arange(len(pairs))
    axis.errorbar(pairs["null"], place, xerr=1.96 * pairs["null_sd"], fmt="|", color="#9aa2ad", capsize=2, label="random units")
    sure = pairs["p"] <= 0.05
    for some, face in ((sure, COLOURS[1]), (~sure, "none")):
        axis.scatter(pairs["share"][some], place[some], s=24, facecolors=face, edgecolors=COLOURS[1])
    axis.set_yticks(place, [_pair(row) for row in pairs.itertuples()])
    axis.invert_yaxis()
    axis.set_xlabel(f"share of the halo's input from {pairs['cluster'].iloc[0]} units")
    axis.legend(frameon=False, fontsize=8)
    return png(figure)


def shares(found: Findings) -> bytes:
    """The shares of all receivers, one panel per pair of layers."""
    table = found["receivers"]
    return _panels(found, lambda axis, pair: _shares(axis, _rows(table, pair)))


def flow(found: Findings) -> bytes:
    """The flow between clusters, one panel per pair of layers."""
    table = found["flow"]
    return _panels(found, lambda axis, pair: _flow(axis, _rows(table, pair)))


def _panels(found: Findings, draw: Callable[[plt.Axes, Any], None]) -> bytes:
    pairs = list(found["pairs"].itertuples())
    pairs = pairs if len(pairs) <= PANELS else [pairs[k] for k in np.linspace(0, len(pairs) - 1, PANELS).round().astype(int)]
    across = min(3, len(pairs))
    down = -(-len(pairs) // across)
    figure, axes = plt.subplots(down, across, figsize=(3.3 * across, 2.7 * down), squeeze=False, layout="constrained")
    for axis, pair in zip(axes.flat, pairs, strict=False):
        draw(axis, pair)
        axis.set_title(_pair(pair), fontsize=8)
    for axis in axes.flat[len(pairs) :]:
        axis.remove()
    return png(figure)


def _shares(axis: plt.Axes, rows: pd.DataFrame) -> None:
    values = rows["share"].dropna()
    axis.hist(values, bins=min(30, max(5, len(values) // 4)), color=COLOURS[0], alpha=0.8)
    if rows["halo"].any():
        axis.axvline(rows["share"][rows["halo"]].min(), color=COLOUR_OF["critical"], linestyle="--", linewidth=1)
    axis.set(xlabel="share", ylabel="units")


def _flow(axis: plt.Axes, rows: pd.DataFrame) -> None:
    value, p = (rows.pivot(index="source", columns="target", values=name) for name in ("flow", "p"))
    top = max(1e-12, float(np.nan_to_num(value.to_numpy()).max()))
    axis.imshow(value, vmin=0, vmax=top, cmap="Blues", aspect="auto")
    for i, j in np.ndindex(value.shape):
        weight = "bold" if p.iat[i, j] <= 0.05 else "normal"
        colour = "white" if value.iat[i, j] > 0.6 * top else "black"
        axis.text(j, i, f"{value.iat[i, j]:.2f}", ha="center", va="center", fontsize=7, fontweight=weight, color=colour)
    axis.set_xticks(range(value.shape[1]), [str(c) for c in value], rotation=30, ha="right", fontsize=7)
    axis.set_yticks(range(len(value)), [str(c) for c in value.index], fontsize=7)


def _rows(table: pd.DataFrame, pair: Any) -> pd.DataFrame:
    return table[(table["layer"] == pair.layer) & (table["next"] == pair.next)]


def _pair(pair: Any) -> str:
    return f"{short(str(pair.layer), 18)} \u2192 {short(str(pair.next), 18)}"
