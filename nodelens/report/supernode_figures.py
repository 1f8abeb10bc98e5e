"""Figures of loss-critical channels, made of what an analysis saved."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from nodelens.analysis.supernodes.agreement import MEAN, POOLED
from nodelens.analysis.supernodes.supernode_result import SupernodesResult, load_supernodes
from nodelens.results.files import write

from .figures import COLOURS, plt, png, short


def drawn(found: SupernodesResult) -> Iterator[tuple[str, bytes, str]]:
    """Name, picture and caption of what there is to draw."""
    yield (
        "concentration",
        concentration(found),
        "Share of each layer's loss proxy that its largest units hold; alike: the diagonal.",
    )
    if found.controls["difference"].notna().any():
        yield (
            "controls",
            controls(found),
            "Redundancy of the halo to its core; of the halo to random cores; of matched units to the core.",
        )
    if len(found.ablation):
        yield (
            "ablation",
            ablation(found),
            "Loss proxy against the true change of the loss; hollow: it falls; dotted: median standard error.",
        )
        yield (
            "agreement",
            agreement(found),
            "Rank correlation of each score with the true change: mean over layers, layers in grey.",
        )
        yield "hits", hits(found), "Share of the most harmful units that are among as many largest by a score, over all layers."
    if len(found.robustness):
        yield "robustness", robustness(found), "Supernodes and loss proxies of resampled texts against each other, a draw a value."


def write_supernodes(folder: str | Path) -> list[Path]:
    """Draws what a folder of ``SupernodesResult.save`` holds into ``figures`` below it; the files, in order.

    Raises FileNotFoundError for a folder without a finished analysis.
    """
    paths = []
    for name, image, _ in drawn(load_supernodes(folder)):
        path = Path(folder) / "figures" / f"{name}.png"
        write(path, partial(Path.write_bytes, data=image))
        paths.append(path)
    return paths


def concentration(result: SupernodesResult) -> bytes:
    """The share of each layer's loss proxy that its largest units hold; alike they would lie on the diagonal."""
    figure, axis = plt.subplots(figsize=(4.6, 3.6), layout="constrained")
    layers = list(result.layers.index)
    for k, layer in enumerate(layers):
        curve = result.concentration[result.concentration["layer"] == layer]
        axis.plot(curve["share"], curve["held"], color=_shade(k, len(layers)), linewidth=1, label=_named(layers, k))
    axis.plot([0, 1], [0, 1], color="#9aa2ad", linewidth=1, linestyle=":")
    axis.set(xlabel="share of the units, largest first", ylabel="share of the loss proxy", xlim=(0, 1), ylim=(0, 1.01))
    axis.legend(frameon=False, fontsize=7)
    return png(figure)


def ablation(result: SupernodesResult, score: str = "loss_proxy") -> bytes:
    """A score against the true change of the loss when the unit goes, on logarithmic axes; a change for the better lies hollow."""
    table = result.ablation.join(result.units[[score]])
    layers = list(dict.fromkeys(table.index.get_level_values("layer")))
    figure, axis = plt.subplots(figsize=(5.4, 4.2), layout="constrained")
    for k, layer in enumerate(layers):
        rows = table.loc[[layer]]
        worse = rows["change"] > 0
        colour = _shade(k, len(layers))
        axis.scatter(rows[score][worse], rows["change"][worse], s=9, color=colour, linewidth=0, label=_named(layers, k))
        axis.scatter(rows[score][~worse], -rows["change"][~worse], s=9, facecolors="none", edgecolors=colour, linewidth=0.6)
    _level(axis, table["change_se"].median())
    pooled = result.pooled()
    rho = pooled[pooled["score"] == score].iloc[0]
    axis.set(xscale="log", yscale="log", xlabel=score.replace("_", " "), ylabel="change of the loss, nats a prediction")
    axis.set_title(
        f"{len(table):,} units; Spearman {rho['spearman']:.2f} +- {rho['spearman_se']:.2f} pooled; hollow: the loss falls"
    )
    axis.legend(frameon=False, fontsize=7)
    return png(figure)


def agreement(result: SupernodesResult) -> bytes:
    """Rank correlations of every score with the true change: the mean over layers with its standard error, layers as dots."""
    table = result.agreement
    place = MEAN if MEAN in set(table["layer"]) else table["layer"].iloc[0]
    mean = table[table["layer"] == place].set_index("score").sort_values("spearman", na_position="first")
    figure, axis = plt.subplots(figsize=(5.4, 1.0 + 0.24 * len(mean)), layout="constrained")
    own = table[~table["layer"].isin([MEAN, POOLED])]
    at = {score: k for k, score in enumerate(mean.index)}
    axis.axvline(0, color="#9aa2ad", linewidth=1, linestyle=":")
    axis.scatter(own["spearman"], own["score"].map(at), s=8, color="#9aa2ad", linewidth=0)
    axis.errorbar(mean["spearman"], range(len(mean)), xerr=mean["spearman_se"], fmt="o", markersize=4, color=COLOURS[0], capsize=2)
    axis.set_yticks(range(len(mean)), mean.index)
    axis.set_xlabel("Spearman correlation with the true change")
    return png(figure)


def hits(result: SupernodesResult) -> bytes:
    """The share of the most harmful units that each score finds, by budget, over all units; dashed: chance."""
    table = result.pooled("hits")
    figure, axis = plt.subplots(figsize=(5.4, 3.6), layout="constrained")
    final = table.groupby("score")["hits"].mean().sort_values(ascending=False)
    for k, score in enumerate(final.index):
        rows = table[table["score"] == score]
        dash = ("-", "-.", ":")[k // len(COLOURS) % 3]
        axis.plot(100 * rows["budget"], rows["hits"], dash, marker="o", markersize=3, color=COLOURS[k % len(COLOURS)], label=score)
    chance = table.drop_duplicates("budget")
    axis.plot(100 * chance["budget"], chance["chance"], color="#1c1f24", linestyle="--", linewidth=1, label="chance")
    axis.set(xscale="log", xlabel="budget, % of the units", ylabel="share of the most harmful found", ylim=(-0.02, 1.02))
    ticks = sorted(100 * chance["budget"])
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    figure.legend(fontsize=7, frameon=False, loc="outside right upper")
    return png(figure)


def controls(result: SupernodesResult) -> bytes:
    """Redundancy of each layer's halo to its core, beside random cores and matched units, with their standard errors."""
    table = result.controls[result.controls["quantity"] == "redundancy"]
    layers = list(result.layers.index)
    figure, axis = plt.subplots(figsize=(5.4, 1.2 + 0.3 * len(layers)), layout="constrained")
    place = np.arange(len(layers))
    for k, (control, rows) in enumerate(table.groupby("control", sort=False)):
        rows = rows.set_index("layer").reindex(layers)
        axis.errorbar(
            rows["other"],
            place + 0.15 * (k + 1),
            xerr=rows["se"],
            fmt="o",
            markersize=3.5,
            color=COLOURS[k + 1],
            capsize=2,
            label="random cores" if control == "random core" else str(control),
        )
    halo = table.drop_duplicates("layer").set_index("layer").reindex(layers)["halo"]
    axis.scatter(halo, place, s=18, color=COLOURS[0], label="halo to its core")
    axis.set_yticks(place, [short(str(layer)) for layer in layers])
    axis.invert_yaxis()
    axis.set_xlabel("redundancy, nats")
    axis.legend(frameon=False, fontsize=7)
    return png(figure)


def robustness(result: SupernodesResult) -> bytes:
    """How resampled texts agree, a box a layer: overlap of supernodes, rank correlation of loss proxies."""
    layers = list(dict.fromkeys(result.robustness["layer"]))
    figure, panels = plt.subplots(1, 2, figsize=(7.4, 1.2 + 0.26 * len(layers)), sharey=True, layout="constrained")
    for axis, column, title in zip(panels, ("jaccard", "spearman"), ("supernodes, Jaccard", "loss proxy, Spearman"), strict=True):
        by = [result.robustness[result.robustness["layer"] == layer][column].dropna() for layer in layers]
        axis.boxplot(by, orientation="horizontal", widths=0.6, medianprops={"color": COLOURS[1]}, flierprops={"markersize": 2})
        axis.set_title(title)
        axis.set_yticks(range(1, len(layers) + 1), [short(str(layer)) for layer in layers])
    panels[0].invert_yaxis()
    return png(figure)


def _shade(k: int, n: int) -> tuple[float, float, float, float]:
    """A colour for the k-th of n layers, dark to bright with depth."""
    return plt.get_cmap("viridis")(0.9 * k / max(n - 1, 1))


def _named(layers: list[str], k: int) -> str | None:
    """A layer's name in a legend: all of a few, of many the first and the last."""
    return short(str(layers[k]), 24) if len(layers) <= 8 or k in (0, len(layers) - 1) else None


def _level(axis: plt.Axes, error: float) -> None:
    """A line at the median standard error of a change: below it a change is noise of the text."""
    if pd.notna(error) and error > 0:
        axis.axhline(error, color="#9aa2ad", linewidth=1, linestyle=":")
