"""Figures of a supernode analysis, drawn from its saved result."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from nodelens.analysis.supernodes.agreement import MEAN, POOLED
from nodelens.analysis.supernodes.controls import RANDOM
from nodelens.analysis.supernodes.supernode_result import SupernodesResult, load_supernodes
from nodelens.results.files import write

from .figures import COLOURS, plt, png, short


def figures_of(found: SupernodesResult) -> Iterator[tuple[str, bytes, str]]:
    """Name, picture and caption of each figure of a result."""
    yield (
        "concentration",
        concentration(found),
        "Share of the units, largest first, against their share of the layer's loss proxy. Equal units would lie on the diagonal.",
    )
    if found.controls["difference"].notna().any():
        yield (
            "controls",
            controls(found),
            "Redundancy of the halo to its supernodes, of the halo to random sets, and of matched units to the supernodes.",
        )
    if len(found.ablation):
        yield (
            "ablation",
            ablation(found),
            "Loss proxy against the change of the loss under ablation. Open circles: it falls; dotted: median standard error.",
        )
        yield (
            "agreement",
            agreement(found),
            "Rank correlation of each score with the change of the loss under ablation: mean over layers; single layers in grey.",
        )
        yield "hits", hits(found), "Share of the k units whose ablation raises the loss most that are among the top k by a score."
    if len(found.robustness):
        yield "robustness", robustness(found), "Agreement of supernodes and loss proxies between resamples, one value per draw."


def write_supernodes(folder: str | Path) -> list[Path]:
    """Draws the figures of a folder written by ``SupernodesResult.save`` into its subfolder ``figures``; returns their paths.

    Raises FileNotFoundError for a folder without a finished analysis.
    """
    paths = []
    for name, image, _ in figures_of(load_supernodes(folder)):
        path = Path(folder) / "figures" / f"{name}.png"
        write(path, partial(Path.write_bytes, data=image))
        paths.append(path)
    return paths


def concentration(result: SupernodesResult) -> bytes:
    """Share of the units, largest first, against their share of the loss proxy; one line per layer."""
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
    """A score against the change of the loss under ablation, on logarithmic axes; open circles where the loss falls."""
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
    axis.set(xscale="log", yscale="log", xlabel=score.replace("_", " "), ylabel="change of the loss, nats per prediction")
    axis.set_title(f"{len(table):,} units; Spearman {rho['spearman']:.2f} +- {rho['spearman_se']:.2f} pooled; open: the loss falls")
    axis.legend(frameon=False, fontsize=7)
    return png(figure)


def agreement(result: SupernodesResult) -> bytes:
    """Rank correlation of each score with the change of the loss: mean over layers with standard error; layers as dots."""
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
    axis.set_xlabel("Spearman correlation with the change of the loss")
    return png(figure)


def hits(result: SupernodesResult) -> bytes:
    """Share of the most harmful units that each score finds, by budget, over all units; dashed: chance."""
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
    """Redundancy of each layer's halo to its supernodes, with the controls and their standard errors."""
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
            label="halo to random sets" if control == RANDOM else f"{control} to supernodes",
        )
    halo = table.drop_duplicates("layer").set_index("layer").reindex(layers)["halo"]
    axis.scatter(halo, place, s=18, color=COLOURS[0], label="halo to its supernodes")
    axis.set_yticks(place, [short(str(layer)) for layer in layers])
    axis.invert_yaxis()
    axis.set_xlabel("redundancy, nats")
    axis.legend(frameon=False, fontsize=7)
    return png(figure)


def robustness(result: SupernodesResult) -> bytes:
    """Agreement of resampled texts, one box per layer: overlap of supernodes, rank correlation of loss proxies."""
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
    """The colour of the k-th of n layers, from dark to bright with depth."""
    return plt.get_cmap("viridis")(0.9 * k / max(n - 1, 1))


def _named(layers: list[str], k: int) -> str | None:
    """The legend entry of a layer: all of up to 8 layers, else the first and the last."""
    return short(str(layers[k]), 24) if len(layers) <= 8 or k in (0, len(layers) - 1) else None


def _level(axis: plt.Axes, error: float) -> None:
    """A line at the median standard error; smaller changes cannot be told from sampling noise."""
    if pd.notna(error) and error > 0:
        axis.axhline(error, color="#9aa2ad", linewidth=1, linestyle=":")
