"""A product of powers of metrics: the exponents that order units best by their damage, and how well these hold on other units."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata

from nodelens.messages import nearest
from nodelens.statistics.sample_hash import generator

from .ranking import correlations, interval, resampled

PRODUCT = "product"  # a row of the table
STEPS = 10  # exponents are tenths
_MOST = 6  # metrics: 3,003 sets of exponents
_CHUNK = 1 << 22  # numbers that are ranked at once


def check_components(table: pd.DataFrame, metrics: Sequence[str]) -> None:
    """Raises ValueError for metrics that are not in the table, or have values below 0, and for fewer than two or too many."""
    if not 2 <= len({*metrics}) == len(metrics) <= _MOST:
        raise ValueError(f"validity: combine has {list(metrics)}; it is 2 to {_MOST} different metrics of the run")
    missing = next((name for name in metrics if name not in table), None)
    if missing is not None:
        near, there = nearest(missing, map(str, table)), ", ".join(map(str, table)) or "none"
        raise ValueError(f"validity: combine names {missing!r}.{near} The metrics of the run are {there}")
    below = next((name for name in metrics if bool((table[name] < 0).any())), None)
    if below is not None:
        raise ValueError(f"validity: combine takes powers, and {below} has values below 0: leave it out")


def combination(
    table: pd.DataFrame, metrics: Sequence[str], truth: str = "damage", draws: int = 200, seed: int = 0
) -> tuple[pd.DataFrame, dict[str, float]]:
    """A row for the product of powers and for each of its metrics, and the exponents, {metric: exponent} without zeros.

    The units of each layer are divided into halves by the seed. On one half, the exponents are those of the grid 0, 0.1, ..., 1
    with sum 1 whose product has the largest Spearman correlation with the damage over all units; of several, those with the fewest
    metrics. Single metrics are points of the grid. On the other half the correlations are measured again.

    Columns: exponent; fit, Spearman's correlation on the half of the search; spearman, low, high, on the other half, with the
    bounds of its 95 % bootstrap interval; gain, gain_low, gain_high, by how much the product is above the metric there; n, units of
    that half. Rows: the product first, then the metrics by ``fit``. Units where one of them is NaN are left out. NaN: fewer than
    three units, or a constant.
    """
    known = table[[*metrics, truth]].replace([np.inf, -np.inf], np.nan).dropna()
    search = known.index.isin(_half(known, seed))
    own, other = known[search], known[~search]
    exponents = _best(_logs(own, metrics), own[truth].to_numpy(float))
    scored = [part.assign(**{PRODUCT: rankdata(_powers(_logs(part, metrics), exponents[None]))}) for part in (own, other)]
    fitted, (_, product, drawn) = scored[0], resampled(scored[1][PRODUCT], other[truth], draws, seed, PRODUCT)
    rows = {}
    for name, exponent in zip((PRODUCT, *metrics), (np.nan, *exponents), strict=True):
        n, value, every = resampled(scored[1][name], other[truth], draws, seed, PRODUCT)
        fit = float(correlations(*(rankdata(fitted[column])[None] for column in (name, truth)))[0]) if len(fitted) > 2 else np.nan
        rows[name] = {"exponent": exponent, "fit": fit, "spearman": value}
        rows[name] |= dict(zip(("low", "high"), interval(every), strict=True)) | {"gain": product - value}
        rows[name] |= dict(zip(("gain_low", "gain_high"), interval(drawn - every), strict=True)) | {"n": n}
    found = pd.DataFrame.from_dict(rows, orient="index").rename_axis("metric")
    single = found.drop(index=PRODUCT).sort_values("fit", ascending=False, kind="stable")
    return pd.concat([found.loc[[PRODUCT]], single]), {m: float(e) for m, e in zip(metrics, exponents, strict=True) if e}


def criterion_of(exponents: Mapping[str, float]) -> dict[str, Any]:
    """The product as a criterion of ``nl.prune``."""
    return {"terms": dict(exponents), "combine": "product"}


def lines_of(found: pd.DataFrame, exponents: Mapping[str, float]) -> list[str]:
    """What the table says, in one line."""
    product, best = found.loc[PRODUCT], found.iloc[1]
    powers = " ".join(f"{name}^{exponent:g}" for name, exponent in exponents.items())
    return [
        f"the product {powers}, searched on half of the units, orders the others with Spearman {product['spearman']:.2f} "
        f"({product['low']:.2f} to {product['high']:.2f}); {found.index[1]}, the best metric of the first half, with "
        f"{best['spearman']:.2f}: {best['gain']:+.2f} ({best['gain_low']:+.2f} to {best['gain_high']:+.2f})"
    ]


def _half(table: pd.DataFrame, seed: int) -> pd.Index:
    """The units of one half, as many of each layer as of the other, up to one."""
    parts = []
    for layer, rows in table.groupby(level="layer", sort=False):
        order = torch.randperm(len(rows), generator=generator(seed, "half", str(layer))).numpy()
        parts.append(rows.index[order[: (len(rows) + 1) // 2]])
    return parts[0].append(parts[1:]) if parts else table.index


def _logs(table: pd.DataFrame, metrics: Sequence[str]) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(table[list(metrics)].to_numpy(float))


def _powers(logs: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """The logarithm of each product, (products, units); of a metric that is 0 it is -inf. logs (units, metrics)."""
    finite = np.where(np.isinf(logs), 0, logs)
    zero = (exponents > 0).astype(float) @ np.isinf(logs).T.astype(float) > 0
    return np.where(zero, -np.inf, exponents @ finite.T)


def _grid(metrics: int) -> np.ndarray:
    """All exponents in tenths with sum 1, (sets, metrics), those with the fewest metrics first."""
    cuts = np.array(list(combinations(range(STEPS + metrics - 1), metrics - 1)), int).reshape(-1, metrics - 1)
    ends = np.concatenate([np.full((len(cuts), 1), -1), cuts, np.full((len(cuts), 1), STEPS + metrics - 1)], 1)
    found = np.diff(ends, axis=1) - 1
    return found[np.argsort((found > 0).sum(1), kind="stable")] / STEPS


def _best(logs: np.ndarray, truth: np.ndarray) -> np.ndarray:
    grid, ranks = _grid(logs.shape[1]), rankdata(truth)[None]
    if len(truth) < 3:
        return grid[0]
    parts = np.array_split(grid, max(1, len(grid) * len(truth) // _CHUNK))
    agreed = [correlations(rankdata(_powers(logs, part), axis=1), ranks) for part in parts]
    found = np.nan_to_num(np.concatenate(agreed), nan=-np.inf)
    return grid[np.flatnonzero(found >= found.max() - 1e-12)[0]]
