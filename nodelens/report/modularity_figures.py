"""Figures of modules: graphs sorted by module, modularity beside its null, and alignment between associations."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from nodelens.results.findings import Findings

from .figures import COLOURS, plt, png, short
from .runs_figures import squares

_GRAPHS = 24  # panels of graphs in a page


def figures_of(found: Findings) -> Iterator[tuple[str, bytes, str]]:
    """Name, picture and caption of each figure of a modularity analysis."""
    modules = found["modules"]
    if not len(modules):
        return
    yield "q", q_bars(modules), "Modularity of the modules found. Grey: mean of random graphs, with two standard deviations."
    yield (
        "graphs",
        graphs(modules, found.matrices),
        "Weights between units, in order of modules, largest first. Bright: strong. Wide layers are averaged over blocks of units.",
    )
    for layer, rows in found["comparison"].groupby("layer", sort=False):
        if len(rows) > 1:
            yield (
                f"alignment-{layer}",
                alignment(rows),
                f"Alignment of the modules of {layer}: share of units in matched modules; in parentheses that of shuffled units.",
            )


def q_bars(modules: pd.DataFrame) -> bytes:
    """Q of every layer, one bar per association, beside the null."""
    layers, names = (list(dict.fromkeys(modules[column])) for column in ("layer", "association"))
    figure, axis = plt.subplots(figsize=(5.4, 1.0 + 0.22 * len(layers) * (len(names) + 0.6)), layout="constrained")
    height = 0.8 / len(names)
    for k, name in enumerate(names):
        rows = modules[modules["association"] == name]
        place = rows["layer"].map(layers.index) + height * (k - (len(names) - 1) / 2)
        axis.barh(place, rows["q"], height * 0.9, color=COLOURS[k % len(COLOURS)], label=name)
        axis.errorbar(rows["q_null"], place, xerr=2 * rows["q_null_std"], fmt="|", color="#5c6470", capsize=2, markersize=6)
    axis.set_yticks(range(len(layers)), [short(str(layer)) for layer in layers])
    axis.invert_yaxis()
    axis.set_xlabel("modularity Q")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=7)
    return png(figure)


def graphs(modules: pd.DataFrame, matrices: dict[tuple[str, str], np.ndarray]) -> bytes:
    """The graph of each layer and association, in order of modules."""
    rows = list(modules.itertuples())[:_GRAPHS]
    across = min(len(rows), max(1, modules["association"].nunique()), 6)
    down = -(-len(rows) // across)
    figure, axes = plt.subplots(down, across, figsize=(2.4 * across, 2.6 * down), squeeze=False, layout="constrained")
    for axis in axes.flat[len(rows) :]:
        axis.remove()
    for axis, row in zip(axes.flat, rows, strict=False):
        picture = np.abs(matrices[row.layer, f"sorted_{row.association}"])
        axis.imshow(picture, cmap="magma", vmin=0, vmax=np.quantile(picture, 0.99) or 1, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"{short(str(row.layer), 24)}, {row.association}\n{row.modules} modules, Q {row.q:.2f}", fontsize=7)
    return png(figure)


def alignment(rows: pd.DataFrame) -> bytes:
    """Alignment between the associations of one layer."""
    names = list(dict.fromkeys(rows[["association_a", "association_b"]].to_numpy().T.ravel()))
    mean, chance = (pd.DataFrame(np.nan, index=names, columns=names) for _ in range(2))
    for row in rows.itertuples():
        for a, b in ((row.association_a, row.association_b), (row.association_b, row.association_a)):
            mean.loc[a, b], chance.loc[a, b] = row.alignment, row.alignment_null
    return squares(mean, chance, "alignment score")
