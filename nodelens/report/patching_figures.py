"""Figures of patching: what each cell of a grid recovers, attribution against exact patching, and logits by component."""

from collections.abc import Iterator

import pandas as pd

from nodelens.results.findings import Findings

from .figures import COLOURS, plt, png
from .lens_figures import grid, shown

_POSITIONS = 64  # that are drawn


def figures_of(found: Findings) -> Iterator[tuple[str, bytes, str]]:
    """Name, picture and caption of each figure of an analysis of patching."""
    if "components" in found.frames:
        yield (
            "components",
            components(found["components"]),
            "What each component adds to the logit, with the scale of the final norm frozen; means over prompts and positions.",
        )
        return
    cells = found["cells"]
    value = "attribution" if "attribution" in cells else "recovered" if cells["recovered"].notna().any() else "kl"
    what = {
        "attribution": "Change of the metric to first order",
        "recovered": "Part of the logit difference that a patch recovers",
        "kl": "KL from the run that the states are from, in nats,",
    }[value]
    for component, table in cells.groupby("component", sort=False):
        yield f"{component}", heatmap(table, value), f"{what} by layer and position: {component}; mean over pairs."
        if component == "heads":
            yield "by-head", by_head(table, value), f"{what} by layer and head: the largest over positions, mean over pairs."
    if "exact" in cells and cells["exact"].notna().any():
        caption = f"Attribution against exact patching; Spearman {found.metadata['spearman']:.2f}."
        yield "exact", against(cells.dropna(subset="exact")), caption


def heatmap(cells: pd.DataFrame, value: str) -> bytes:
    """Layers by positions; heads are added up for an attribution, otherwise the head of largest size counts."""
    means = cells.groupby(["layer", "head", "position"], dropna=False)[value].mean().reset_index()
    largest = means.loc[means.groupby(["layer", "position"])[value].transform(lambda v: v.abs().max()) == means[value].abs()]
    chosen = means.groupby(["layer", "position"], as_index=False)[value].sum() if value == "attribution" else largest
    table = chosen.drop_duplicates(["layer", "position"]).pivot(index="layer", columns="position", values=value)
    table = table.sort_index(ascending=False).iloc[:, :_POSITIONS]
    return grid(table, None, _ticks(cells, list(table.columns)), "position", value, diverging=value != "kl")


def by_head(cells: pd.DataFrame, value: str) -> bytes:
    """Layers by heads."""
    means = cells.groupby(["layer", "head", "position"])[value].mean()
    best = means.groupby(["layer", "head"]).agg(lambda v: v.loc[v.abs().idxmax()] if v.notna().any() else float("nan"))
    table = best.unstack("head").sort_index(ascending=False)
    return grid(table, None, [str(k) for k in table.columns], "head", value, diverging=value != "kl")


def against(cells: pd.DataFrame) -> bytes:
    """The first-order change of each cell against the exact one."""
    figure, axis = plt.subplots(figsize=(4.2, 3.6), layout="constrained")
    for k, (component, table) in enumerate(cells.groupby("component", sort=False)):
        axis.scatter(table["attribution"], table["exact"], s=10, color=COLOURS[k % len(COLOURS)], linewidth=0, label=str(component))
    axis.axline((0, 0), slope=1, color="#9aa2ad", linewidth=1, linestyle=":")
    axis.set(xlabel="attribution", ylabel="exact change")
    axis.legend(frameon=False, fontsize=7)
    return png(figure)


def components(table: pd.DataFrame) -> bytes:
    """Contributions by layer: one bar per component, heads added up."""
    means = table.assign(part=table["component"].replace({"head": "attention", "attention_bias": "attention"}))
    runs = means.groupby(["sample", "position"]).ngroups
    sums = means.groupby(["part", "layer"], dropna=False)["contribution"].sum() / runs
    figure, axis = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    parts = list(dict.fromkeys(means["part"]))
    layers = sorted(means["layer"].dropna().unique())
    for k, part in enumerate(parts):
        own = sums[part]
        at = [-1 if pd.isna(layer) else layers.index(layer) for layer in own.index]
        shift = (k - len(parts) / 2) * 0.8 / len(parts)
        axis.bar([x + shift for x in at], own, 0.8 / len(parts), color=COLOURS[k % len(COLOURS)], label=part)
    axis.axhline(0, color="#9aa2ad", linewidth=0.8)
    axis.set_xticks(range(-1, len(layers)), ["none", *map(str, layers)])
    axis.set(xlabel="layer", ylabel="contribution to the logit")
    axis.legend(frameon=False, fontsize=7)
    return png(figure)


def _ticks(cells: pd.DataFrame, positions: list[int]) -> list[str]:
    """The tokens of both prompts at each position of the first pair; one where they are the same."""
    first = cells[cells["pair"] == cells["pair"].iloc[0]].drop_duplicates("position").set_index("position")
    pairs = [(first.loc[k, "clean"], first.loc[k, "corrupt"]) if k in first.index else (k, k) for k in positions]
    return [shown(a) if a == b else f"{shown(a)}/{shown(b)}" for a, b in pairs]
