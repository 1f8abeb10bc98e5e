"""Figures of a geometry analysis, drawn from its saved result."""

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nodelens.analysis.geometry.bundle import GeometryResult

from .figures import COLOURS, png

_DIMENSIONS = {
    "d_pr": "participation ratio",
    "d_pr_debiased": "participation ratio, debiased",
    "d_entropy": "exp of spectral entropy",
    "stable_rank": "stable rank",
    "k90": "axes for 90 % of the variance",
}
_STEPS = {
    "linear_cka": "1 - linear CKA",
    "linear_cka_debiased": "1 - linear CKA, debiased",
    "layer_cosine_sim": "1 - cosine",
    "feature_subspace_novelty": "subspace novelty",
}


def figures_of(found: GeometryResult) -> Iterator[tuple[str, bytes, str]]:
    """Name, picture and caption of each figure of a result."""
    if any(name in found.metrics for name in _DIMENSIONS):
        picture = _by_point(found.by_point(found.metrics), "layer", _DIMENSIONS, "dimensions")
        yield "dimensions", picture, "Effective dimension of the rows of each layer, by five measures."
    if found.eigenvalues:
        yield "spectra", spectra(found.eigenvalues), "Eigenvalues of each layer's covariance / their sum; dark: early layers."
    if any(name in found.novelty for name in _STEPS):
        steps = found.novelty.assign(**{n: 1 - found.novelty[n] for n in _STEPS if n in found.novelty and "novelty" not in n})
        picture = _by_point(found.by_point(steps), "transition", _STEPS, "distance")
        yield "novelty", picture, "Distance between consecutive layers; 0: no change."
    if len(found.experts):
        yield "experts", experts(found.experts), "Share of the assignments of each expert, times their number; 1: balanced."
    for name, table in found.diagnostics.items():
        parts = {
            point: part.pivot_table(index="layer", columns="variant", values="d_pr", sort=False).reset_index()
            for point, part in found.by_point(table).items()
        }
        picture = _by_point(parts, "layer", {variant: variant for variant in table.variant.unique()}, "participation ratio")
        yield name, picture, "Participation ratio of raw rows, of rows scaled to equal norm, and of standardised units."


def spectra(eigenvalues: dict[str, np.ndarray]) -> bytes:
    """Spectra on logarithmic axes, one line per layer."""
    figure, axis = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(eigenvalues)))
    for colour, values in zip(colours, eigenvalues.values(), strict=True):
        share = values[values > 0] / values.sum()
        axis.loglog(np.arange(1, len(share) + 1), share, color=colour, linewidth=1)
    axis.set(xlabel="rank of the eigenvalue", ylabel="share of the variance")
    return png(figure)


def experts(table: pd.DataFrame) -> bytes:
    """Loads of experts, one row per layer and one column per expert."""
    load = table.pivot_table(index="layer", columns="expert", values="load")
    even = load * load.notna().sum(1).to_numpy()[:, None]
    figure, axis = plt.subplots(figsize=(2.4 + 0.28 * min(len(even.columns), 30), 1.2 + 0.24 * len(even)), layout="constrained")
    picture = axis.imshow(even, aspect="auto", cmap="viridis", vmin=0, vmax=max(2.0, float(np.nanmax(even.to_numpy()))))
    axis.set(xlabel="expert", ylabel="layer", yticks=range(len(even)), yticklabels=even.index)
    figure.colorbar(picture, label="load / balanced load")
    return png(figure)


def _by_point(parts: dict[str, pd.DataFrame], x: str, columns: dict[str, str], label: str) -> bytes:
    """Columns by layer or by layer transition, one panel per hook point."""
    size = (4.6 * len(parts) + 1.4, 3.4)
    figure, axes = plt.subplots(1, len(parts), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, (point, part) in zip(axes.flat, parts.items(), strict=True):
        for k, (name, text) in enumerate((n, t) for n, t in columns.items() if n in part):
            axis.plot(range(len(part)), part[name], marker="o", markersize=3, color=COLOURS[k % len(COLOURS)], label=text)
        _named(axis, [str(v) for v in part[x]])
        axis.set(title=point, xlabel=x, ylim=(0, None))
    axes.flat[0].set_ylabel(label)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return png(figure)


def _named(axis: Axes, names: list[str], most: int = 16) -> None:
    """Labelled ticks, at most ``most`` of them."""
    step = -(-len(names) // most)
    axis.set_xticks(range(0, len(names), step), names[::step], rotation=0 if max(map(len, names)) < 4 else 60)
