"""Modules of units over many runs: modularity against the settings, matrices sorted by module, alignment between associations."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nodelens.analysis.modularity.columns import labels_of
from nodelens.results.result import load
from nodelens.results.runs import load_runs

from . import runs_figures as figures
from .document import Document
from .elements import section, table
from .modularity_figures import names_of, pictures, sorted_by, square, squares
from .plot import Plot
from .settings import settings_of, usual

_SIDES = {"forward": "upstream", "backward": "downstream"}
_MATRICES = 12  # association matrices that the page shows


def modularity_over_runs(document: Document, runs: Any) -> list[str]:
    """The section of a page over runs that have ``analysis=[modularity]``."""
    modules = load_runs(runs, rows="modularity.modules")
    parts = _modularity(document, modules) + _matrices(document, modules) + _alignment(document, runs)
    return section("Modules", parts)


def _modularity(document: Document, modules: pd.DataFrame) -> list[str]:
    """Modularity of the partitions found against each setting, a figure per layer, and the means over runs."""
    settings = settings_of(modules)
    parts = []
    for layer, rows in modules.groupby("layer", sort=False):
        if settings:
            plot = figures.against_settings(rows, ["q"], settings, "association", usual(rows, settings))
            title = f"Modularity against the settings: {layer}"
            parts.append(document.plot(replace(plot, name=f"modularity-{layer}", title=title, caption=_Q)))
    means = modules.groupby(["layer", "association", *settings[:1]], sort=False)["q"].agg(["mean", "std", "count"])
    return [*parts, table(means.reset_index().set_index("layer"))]


def _matrices(document: Document, modules: pd.DataFrame) -> list[str]:
    """The matrices of the runs with the lowest and the highest modularity, sorted by module."""
    mean = modules.groupby("run")["q"].mean().sort_values()
    layer = modules["layer"].iloc[0]
    panels: dict[str, np.ndarray] = {}
    for run in dict.fromkeys([mean.index[0], mean.index[-1]]):
        result = load(run)
        for name in dict.fromkeys(modules["association"]):
            labels, matrix = labels_of(result.units, layer, name), result.matrices.get((layer, name))
            if labels is not None and matrix is not None and len(matrix) == len(labels):
                q = modules.query("run == @run and layer == @layer and association == @name")["q"].iloc[0]
                numbers = labels.to_numpy(float)
                numbers[numbers < 0] = np.nan  # in no module
                panels[f"{name}, Q {q:.2f}, {Path(run).name}"] = sorted_by(matrix, numbers)
    if not panels:
        return []
    shown = dict(list(panels.items())[:_MATRICES])
    plot = Plot("modules", f"The modules as blocks: {layer}", _SORTED, pictures(shown), modules[modules["layer"] == layer])
    return [document.plot(plot)]


def _alignment(document: Document, runs: Any) -> list[str]:
    """Alignment of the modules of two associations, means over layers and runs, with the mean of shuffled modules."""
    try:
        pairs = load_runs(runs, rows="modularity.comparison")
    except FileNotFoundError:  # a single association was asked for
        return []
    mean, chance = (square(pairs, value, names_of(pairs)) for value in ("alignment", "alignment_null"))
    plot = Plot("alignment", "Do associations find the same modules?", _ALIGNED, squares(mean, chance, "alignment score"), pairs)
    return [document.plot(plot), *_sides(pairs)]


def _sides(pairs: pd.DataFrame) -> list[str]:
    """Alignment within and across associations upstream and downstream of the units: means over runs, of means over layers."""
    side = pairs[["association_a", "association_b"]].map(lambda name: _SIDES.get(str(name).partition("_")[0]))
    known = pairs[side.notna().all(axis=1)]
    a, b = (side.loc[known.index, column] for column in side)
    if not len(known):
        return []
    kind = ("within " + a).where(a == b, "across")
    runs = known.groupby([kind.rename("associations"), known["run"]], sort=False)[["alignment", "alignment_null"]].mean()
    found = runs.groupby(level="associations", sort=False).agg(["mean", "std"])
    found.columns = [f"{'by chance' if name.endswith('null') else name}, {how}" for name, how in found.columns]
    return ["<p>Upstream: forward_cov, forward_jac. Downstream: backward_jac, backward_hess, backward_ggn.</p>", table(found)]


_Q = (
    "Modularity Q of the modules found, a line per association. Means over runs with 95 % intervals; the other settings have their "
    "most frequent choice."
)
_SORTED = (
    "Absolute associations of units, sorted by module, in the run with the lowest and in that with the highest mean modularity. "
    "Units in no module come last."
)
_ALIGNED = (
    "Alignment score of the modules found from two associations: the share of units in matched modules, mean over layers and runs. "
    "In parentheses: the mean for shuffled modules."
)
