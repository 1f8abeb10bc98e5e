"""``nl.compare_modules``: modules across associations, layers, epochs and runs."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

from nodelens.engine.associations import ALL_LAYERS
from nodelens.messages import as_seed
from nodelens.results.result import Result

from .columns import every_labels
from .graph import NONE
from .tables import Partitioned, comparison_table, within

Across = Literal["associations", "layers", "runs"]
_KEYS = {"associations": "association", "layers": "layer", "runs": "run"}


def compare_modules(
    results: Result | pd.DataFrame | Sequence[Result] | Mapping[str, Result | pd.DataFrame],
    across: Across = "runs",
    *,
    units: Mapping[str, Any] | None = None,
    absolute: bool = True,
    gamma: float = 1.0,
    shuffles: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Compares the modules that ``analysis=["modularity"]`` found, as columns ``module_<association>`` of units.

    results: a result, several, {name: result}, or tables of units, such as those of ``epochs/``; tables alone leave out what reads
             the associations
    across:  associations: of the same layer and run. layers: of equal width, with units in the same order, such as the channels of
             a residual stream. runs: of the same layer and association, between all pairs of results, such as epochs
    units:   {layer: (units,) which unit of the second of two results is the unit of the first, -1 for none}, for networks whose
             units have no common order, see ``match_units``. Modules of all layers together are left out, unless units has ``all``
    shuffles: of units, for the p of the alignment

    Returns one row per pair: alignment (share of units in matched modules) with its null, z and p, ami, ari, vi (variation of
    information, nats), element_sim, transfer (Q of the first association with the modules of the second), transfer_normalized
    (divided by Q with its own), both also ``_back``, and adj_spearman (Spearman correlation of the associations).

    Raises ValueError for another ``across``, results without modules, layers of another width in two runs, and ``units`` beside
    another number of results than two.
    """
    if across not in get_args(Across):
        raise ValueError(f"across is {across!r}; it is one of {', '.join(get_args(Across))}")
    seed = as_seed(seed)
    named = _named(results)
    if units is not None and (across != "runs" or len(named) != 2):
        raise ValueError(f"units= says how two runs correspond, and there are {len(named)} with across={across!r}")
    parts = [part for run, each in named.items() for part in _parts(run, each)]
    if not parts:
        raise ValueError('no result has modules: run nl.analyze(..., analysis=["modularity"]) first')
    if units is not None:
        parts = [part for part in parts if part.names["layer"] != ALL_LAYERS or ALL_LAYERS in units]
        second = list(named)[1]
        parts = [_reordered(part, units) if part.names["run"] == second else part for part in parts]
    pairs = within(parts, _KEYS[across])
    if across == "layers":
        pairs = [(a, b) for a, b in pairs if len(a.labels) == len(b.labels)]
    for a, b in pairs:
        if len(a.labels) != len(b.labels):
            raise ValueError(
                f"{a.names['layer']} has {len(a.labels)} units in {a.names['run']} and {len(b.labels)} in {b.names['run']}: "
                "compare networks of the same widths, or give units="
            )
    fixed = [name for name in ("run", "layer", "association") if name != _KEYS[across]]
    return comparison_table(pairs, _KEYS[across], fixed, absolute=absolute, gamma=gamma, shuffles=shuffles, seed=seed)


def match_units(a: Any, b: Any) -> np.ndarray:
    """Which unit of one network is most like each unit of another, (units of a,) int64, -1 where there are too few.

    a, b: activations of the same samples, (rows, units); arrays or tensors

    Units are matched one to one, so that the sum of the correlations of their activations is largest (Hungarian method). A unit
    that does not vary correlates with none. Source: Li et al. 2016, Convergent learning, 1511.07543, section 3.2.

    Raises ValueError for another number of rows, and for rows that are not finite.
    """
    first, second = (np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, np.float64) for x in (a, b))
    if first.ndim != 2 or second.ndim != 2 or len(first) != len(second):
        raise ValueError(f"activations have the shape (rows, units), of the same rows; these have {first.shape} and {second.shape}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("activations are not finite: leave rows with NaN or infinity out")
    first, second = (_standardized(x) for x in (first, second))
    partners = np.full(first.shape[1], -1)
    rows, columns = linear_sum_assignment(first.T @ second, maximize=True)
    partners[rows] = columns
    return partners


def _standardized(rows: np.ndarray) -> np.ndarray:
    centred = rows - rows.mean(0)
    length = np.sqrt((centred**2).sum(0))
    return centred / np.where(length > 0, length, np.inf)


def _named(results: Any) -> dict[str, Result | pd.DataFrame]:
    if isinstance(results, (Result, pd.DataFrame)):
        return {"0": results}
    every = results.items() if isinstance(results, Mapping) else enumerate(results)
    return {str(name): each for name, each in every}


def _parts(run: str, given: Result | pd.DataFrame) -> list[Partitioned]:
    units, matrices = (given.units, given.matrices) if isinstance(given, Result) else (given, {})
    if units.index.nlevels == 1 and {"layer", "unit"} <= set(units):
        units = units.set_index(["layer", "unit"])
    parts = []
    for (layer, name), labels in every_labels(units).items():
        matrix = matrices.get((layer, name))
        same = matrix is not None and len(matrix) == len(labels)  # of a wide layer, only some units have associations
        parts.append(Partitioned({"run": run, "layer": layer, "association": name}, labels, matrix if same else None))
    return parts


def _reordered(part: Partitioned, units: Mapping[str, Any]) -> Partitioned:
    """A partition with its units in the order of another network; units without a partner are in no module."""
    if part.names["layer"] not in units:
        return part
    order = np.asarray(units[part.names["layer"]], np.int64)
    if order.max(initial=-1) >= len(part.labels):
        raise ValueError(f"units= names unit {order.max()} of {part.names['layer']}, which has {len(part.labels)}")
    labels = np.where(order >= 0, part.labels[order], NONE)
    matrix = part.association
    if matrix is not None:
        matrix = np.where((order < 0)[:, None] | (order < 0), np.nan, matrix[np.ix_(order, order)])
    return Partitioned(part.names, labels, matrix)
