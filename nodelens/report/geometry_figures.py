"""Plots of a geometry analysis, made from its saved result."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from nodelens.analysis.geometry.bundle import GeometryResult

from .charts import grid, line, panels
from .metric_figures import curves, longest
from .plot import Plot, names_axis

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


def figures_of(found: GeometryResult) -> Iterator[Plot]:
    """The plots of a result."""
    if any(name in found.metrics for name in _DIMENSIONS):
        figure = _by_point(found.by_point(found.metrics), "layer", _DIMENSIONS, "dimensions")
        yield Plot(
            "dimensions", "Effective dimension by depth", "Of the rows of each layer, by five measures.", figure, found.metrics
        )
    if found.eigenvalues:
        shares = {name: values / values.sum() for name, values in found.eigenvalues.items()}
        figure = curves(shares, "share of the variance")
        yield Plot("spectra", "How the variance is spread over directions", _SPECTRA, figure, longest(shares))
    if any(name in found.novelty for name in _STEPS):
        steps = found.novelty.assign(**{n: 1 - found.novelty[n] for n in _STEPS if n in found.novelty and "novelty" not in n})
        figure = _by_point(found.by_point(steps), "transition", _STEPS, "distance")
        yield Plot("novelty", "How much each layer changes", "Distance between consecutive layers; 0: no change.", figure, steps)
    if len(found.experts):
        yield Plot("experts", "Are experts used evenly?", _EXPERTS, experts(found.experts), found.experts)
    for name, table in found.diagnostics.items():
        parts = {
            point: part.pivot_table(index="layer", columns="variant", values="d_pr", sort=False).reset_index()
            for point, part in found.by_point(table).items()
        }
        figure = _by_point(parts, "layer", {variant: variant for variant in table.variant.unique()}, "participation ratio")
        yield Plot(name, f"What scaling does to the dimension: {name}", _SCALED, figure, table)


def experts(table: pd.DataFrame) -> Any:
    """Loads of experts, one row per layer and one column per expert."""
    load = table.pivot_table(index="layer", columns="expert", values="load")
    even = load * load.notna().sum(1).to_numpy()[:, None]
    return grid(even, "load / balanced load", "expert", limits=(0, max(2.0, float(np.nanmax(even.to_numpy())))))


def _by_point(parts: dict[str, pd.DataFrame], x: str, columns: dict[str, str], label: str) -> Any:
    """Columns by layer or by layer transition, one panel per hook point."""

    def draw(point: Any) -> list[dict[str, Any]]:
        part = parts[point]
        named = [str(value) for value in part[x]]
        known = [(name, words) for name, words in columns.items() if name in part]
        return [
            line(
                np.arange(len(part)),
                part[name],
                words,
                k,
                text=named,
                hovertemplate="%{text}: %{y:.3g}<extra>%{fullData.name}</extra>",
            )
            for k, (name, words) in enumerate(known)
        ]

    names = max((list(part[x]) for part in parts.values()), key=len)
    step = max(1, -(-len(names) // 14))
    axis = names_axis(names, most=14) | {"tickvals": list(range(0, len(names), step)), "ticktext": [str(n) for n in names[::step]]}
    return panels(list(parts), draw, x, label, len(parts), 300, axes={"x": axis, "y": {"rangemode": "tozero"}})


_SPECTRA = "Eigenvalues of each layer's covariance, divided by their sum, on logarithmic axes. Dark lines are early layers."
_EXPERTS = "Share of the assignments of each expert, times their number; 1: balanced."
_SCALED = "Participation ratio of raw rows, of rows scaled to equal norm, and of standardised units."
