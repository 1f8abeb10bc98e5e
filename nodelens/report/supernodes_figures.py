"""Plots of a supernode analysis, made from its saved result."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from nodelens.analysis.supernodes.agreement import MEAN, POOLED
from nodelens.analysis.supernodes.controls import RANDOM
from nodelens.analysis.supernodes.supernode_result import SupernodesResult

from .charts import at, box_rows, diagonal, dots, line, spread
from .plot import GREY, Plot, figure_of, rows_axis, rows_height, shade, text

_LINES = 60


def figures_of(found: SupernodesResult) -> Iterator[Plot]:
    """The plots of a result."""
    yield Plot("concentration", "Do few units hold the loss proxy?", _CONCENTRATION, concentration(found), found.concentration)
    if found.controls["difference"].notna().any():
        yield Plot("controls", "Is the halo redundant to its supernodes?", _CONTROLS, controls(found), found.controls)
    if len(found.ablation):
        table = found.ablation.join(found.units[["loss_proxy"]])
        yield Plot("ablation", "Does the loss proxy predict what an ablation does?", _ABLATION, ablation(found), table)
        yield Plot("scores", "Which score predicts the ablation best?", _AGREEMENT, agreement(found), found.agreement)
        yield Plot("hits", "Which score finds the harmful units?", _HITS, hits(found), found.pooled("hits"))
    if len(found.robustness):
        table = found.robustness
        for column, what, label in (
            ("jaccard", "Are the supernodes the same in other texts?", "Jaccard index of the supernodes"),
            ("spearman", "Is the order by loss proxy the same in other texts?", "Spearman correlation of the loss proxy"),
        ):
            by = {layer: rows[column] for layer, rows in table.groupby("layer", sort=False)}
            limits = (-0.02, 1.02) if column == "jaccard" else None
            yield Plot(f"robustness-{column}", what, _ROBUSTNESS, box_rows(by, label, limits=limits), table)


def concentration(result: SupernodesResult) -> Any:
    """Share of the units, largest first, against their share of the loss proxy; one line per layer."""
    layers, every = list(result.layers.index), dict(list(result.concentration.groupby("layer", sort=False)))
    traces = [diagonal(0, 1)]
    for layer in spread(layers, _LINES):
        curve, style = every[layer], {"color": shade(layers.index(layer), len(layers)), "width": 1.2}
        traces.append(line(curve["share"], curve["held"], layer, mode="lines", line=style))
    axes = {"xaxis": {"title": {"text": "share of the units, largest first"}, "range": [0, 1]}}
    return figure_of(traces, 420, **axes, yaxis={"title": {"text": "share of the loss proxy"}, "range": [0, 1.01]})


def ablation(result: SupernodesResult, score: str = "loss_proxy") -> Any:
    """A score against the change of the loss under ablation, on logarithmic axes; open circles where the loss falls."""
    table = result.ablation.join(result.units[[score]])
    layers = list(dict.fromkeys(table.index.get_level_values("layer")))
    traces = []
    for k, layer in enumerate(layers):
        rows = table.loc[[layer]]
        marker = {"color": shade(k, len(layers)), "size": 5, "symbol": np.where(rows["change"] > 0, "circle", "circle-open")}
        units = [f"{text(layer)} {unit}" for unit in rows.index.get_level_values("unit")]
        hover: dict[str, Any] = {"text": units, "hovertemplate": "%{text}<br>%{x:.3g}, %{y:.3g}<extra></extra>"}
        traces.append(dots(rows[score], rows["change"].abs(), layer, marker=marker, **hover))
    error = table["change_se"].median()
    lines = [at(error, "y")] if pd.notna(error) and error > 0 else []
    words = {"xaxis": {"type": "log", "title": {"text": score.replace("_", " ")}}}
    title = {"text": "size of the change of the loss, nats per prediction"}
    return figure_of(traces, 460, **words, yaxis={"type": "log", "title": title}, shapes=lines)


def agreement(result: SupernodesResult) -> Any:
    """Rank correlation of each score with the change of the loss: mean over layers with standard error; layers as dots."""
    table = result.agreement
    place = MEAN if MEAN in set(table["layer"]) else table["layer"].iloc[0]
    mean = table[table["layer"] == place].set_index("score").sort_values("spearman", ascending=False)
    own = table[~table["layer"].isin([MEAN, POOLED])]
    where = {score: k for k, score in enumerate(mean.index)}
    single = {"color": GREY, "size": 5}
    hover: dict[str, Any] = {"text": [text(layer) for layer in own["layer"]], "hovertemplate": "%{text}<br>%{x:.3f}<extra></extra>"}
    traces = [dots(own["spearman"], own["score"].map(where), "single layers", marker=single, **hover)]
    traces.append(dots(mean["spearman"], np.arange(len(mean)), "mean over layers", error=mean["spearman_se"], marker={"size": 8}))
    axis = {"title": {"text": "Spearman correlation with the change of the loss"}}
    return figure_of(traces, rows_height(len(mean)), xaxis=axis, yaxis=rows_axis(list(mean.index)), shapes=[at(0)])


def hits(result: SupernodesResult) -> Any:
    """Share of the most harmful units that each score finds, by budget, over all units; dashed: chance."""
    table = result.pooled("hits")
    final = table.groupby("score")["hits"].mean().sort_values(ascending=False)
    traces = []
    for k, score in enumerate(final.index):
        rows = table[table["score"] == score]
        traces.append(line(100 * rows["budget"], rows["hits"], score, k))
    chance = table.drop_duplicates("budget")
    style: dict[str, Any] = {"color": GREY, "dash": "dash", "width": 1.5}
    traces.append(line(100 * chance["budget"], chance["chance"], "chance", mode="lines", line=style))
    ticks = sorted(100 * chance["budget"])
    axis = {"type": "log", "title": {"text": "budget, % of the units"}, "tickvals": ticks, "ticktext": [f"{t:g}" for t in ticks]}
    title = {"text": "share of the most harmful found"}
    return figure_of(traces, 420, xaxis=axis, yaxis={"title": title, "range": [-0.02, 1.02]})


def controls(result: SupernodesResult) -> Any:
    """Redundancy of each layer's halo to its supernodes, with the controls and their standard errors."""
    table = result.controls[result.controls["quantity"] == "redundancy"]
    layers = list(result.layers.index)
    place = np.arange(len(layers))
    traces = []
    for k, (control, rows) in enumerate(table.groupby("control", sort=False)):
        rows = rows.set_index("layer").reindex(layers)
        name = "halo to random sets" if control == RANDOM else f"{control} to supernodes"
        traces.append(dots(rows["other"], place + 0.15 * (k + 1), name, k + 1, rows["se"]))
    halo = table.drop_duplicates("layer").set_index("layer").reindex(layers)["halo"]
    traces.append(dots(halo, place, "halo to its supernodes", 0, marker={"size": 9}))
    axis = {"title": {"text": "redundancy, nats"}}
    return figure_of(traces, rows_height(len(layers), 30), xaxis=axis, yaxis=rows_axis(layers, "layer"))


_CONCENTRATION = (
    "Share of the units, largest first, against their share of the layer's loss proxy. Equal units would lie on the dotted line. "
    "Dark lines are early layers."
)
_CONTROLS = "Redundancy of the halo to its supernodes, of the halo to random sets, and of matched units to the supernodes."
_ABLATION = (
    "One dot per unit; dark layers are early ones. Open circles: the loss falls; dotted: median standard error, below which "
    "changes cannot be told from noise."
)
_AGREEMENT = "Rank correlation of each score with the change of the loss under ablation, with standard errors."
_HITS = "Share of the k units whose ablation raises the loss most that are among the top k by a score."
_ROBUSTNESS = "Agreement between resamples of the texts, one value per draw."
