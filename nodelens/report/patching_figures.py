"""Plots of patching: what each cell of a grid recovers, attribution against exact patching, and logits by component."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from nodelens.results.findings import Findings

from .charts import diagonal, dots, grid
from .lens_figures import over_tokens, shown
from .plot import Plot, colour, figure_of, text

_POSITIONS = 64  # that are drawn


def figures_of(found: Findings) -> Iterator[Plot]:
    """The plots of an analysis of patching."""
    if "components" in found.frames:
        table = found["components"]
        yield Plot("components", "What each component adds to the logit", _COMPONENTS, components(table), table)
        return
    cells = found["cells"]
    value = "attribution" if "attribution" in cells else "recovered" if cells["recovered"].notna().any() else "kl"
    for component, table in cells.groupby("component", sort=False):
        title = f"Where the prediction depends on the states: {component}"
        yield Plot(f"patching-{component}", title, f"{_WHAT[value]} by layer and position; {_MEAN}", heatmap(table, value), table)
        if component == "heads":
            caption = f"{_WHAT[value]} by layer and head: the largest over positions, mean over pairs."
            yield Plot("by-head", "Which heads the prediction depends on", caption, by_head(table, value), table)
    if "exact" in cells and cells["exact"].notna().any():
        known = cells.dropna(subset="exact")
        rank = found.metadata.get("spearman")  # None where one of the two does not vary
        caption = f"On the dotted line they agree; Spearman {'undefined' if rank is None else f'{rank:.2f}'}."
        yield Plot("exact", "Attribution against exact patching", caption, against(known), known)


def heatmap(cells: pd.DataFrame, value: str) -> Any:
    """Layers by positions; heads are added up for an attribution, otherwise the head of largest size counts."""
    means = cells.groupby(["layer", "head", "position"], dropna=False)[value].mean().reset_index()
    largest = means.loc[means.groupby(["layer", "position"])[value].transform(lambda v: v.abs().max()) == means[value].abs()]
    chosen = means.groupby(["layer", "position"], as_index=False)[value].sum() if value == "attribution" else largest
    table = chosen.drop_duplicates(["layer", "position"]).pivot(index="layer", columns="position", values=value)
    table = table.sort_index(ascending=False).iloc[:, :_POSITIONS]
    words = table.map(lambda v: "" if np.isnan(v) else f"{v:.2g}") if table.shape[1] <= 24 else None
    read = _tokens(cells, list(table.columns))
    component = ", ".join(cells["component"].unique())
    lines = [f"{component}, token " + " / ".join(shown(token, 24) for token in both) for both in read]
    hover = pd.DataFrame([lines] * len(table), table.index, table.columns)
    return over_tokens(table, value, ["/".join(map(shown, both)) for both in read], hover, words=words, diverging=value != "kl")


def by_head(cells: pd.DataFrame, value: str) -> Any:
    """Layers by heads."""
    means = cells.groupby(["layer", "head", "position"])[value].mean()
    best = means.groupby(["layer", "head"]).agg(lambda v: v.loc[v.abs().idxmax()] if v.notna().any() else float("nan"))
    table = best.unstack("head").sort_index(ascending=False)
    return grid(table, value, "head", diverging=value != "kl")


def against(cells: pd.DataFrame) -> Any:
    """The first-order change of each cell against the exact one."""
    by = cells.groupby("component", sort=False)
    traces = [dots(table["attribution"], table["exact"], name, k) for k, (name, table) in enumerate(by)]
    every = cells[["attribution", "exact"]].to_numpy(float)
    axes = {"xaxis": {"title": {"text": "attribution"}}, "yaxis": {"title": {"text": "exact change"}}}
    return figure_of([diagonal(np.nanmin(every), np.nanmax(every)), *traces], 420, **axes)


def components(table: pd.DataFrame) -> Any:
    """Contributions by layer: one bar per component, heads added up."""
    means = table.assign(part=table["component"].replace({"head": "attention", "attention_bias": "attention"}))
    runs = means.groupby(["sample", "position"]).ngroups
    sums = means.groupby(["part", "layer"], dropna=False)["contribution"].sum() / runs
    traces = []
    for k, part in enumerate(dict.fromkeys(means["part"])):
        own = sums[part]
        at = ["none" if pd.isna(layer) else str(layer) for layer in own.index]
        traces.append({"type": "bar", "x": at, "y": own.to_numpy(), "name": text(part), "marker": {"color": colour(k)}})
    layers = ["none", *map(str, sorted(means["layer"].dropna().unique()))]
    axis = {"type": "category", "categoryorder": "array", "categoryarray": layers, "title": {"text": "layer"}}
    return figure_of(traces, 380, xaxis=axis, yaxis={"title": {"text": "contribution to the logit"}}, barmode="group")


def _tokens(cells: pd.DataFrame, positions: list[int]) -> list[tuple[object, ...]]:
    """The tokens of both prompts at each position of the first pair; one where they are the same, none behind its end."""
    first = cells[cells["pair"] == cells["pair"].iloc[0]].drop_duplicates("position").set_index("position")
    pairs = [(first.loc[k, "clean"], first.loc[k, "corrupt"]) if k in first.index else () for k in positions]
    return [tuple(dict.fromkeys(both)) for both in pairs]


_WHAT = {
    "attribution": "Change of the metric to first order",
    "recovered": "Part of the logit difference that a patch recovers",
    "kl": "KL from the run that the states are from, in nats,",
}
_MEAN = "mean over pairs. Positions are named by the tokens of the first pair, clean/corrupt where they differ."
_COMPONENTS = "With the scale of the final norm frozen; means over prompts and positions. None: the embeddings."
