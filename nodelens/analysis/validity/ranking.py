"""Agreement of metrics with the true damage: rank correlations with bootstrap intervals, recall at k, the ranking of metrics."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata

from nodelens.analysis.supernodes.agreement import MEAN, POOLED, hits, spearman
from nodelens.statistics.sample_hash import generator

COLUMNS = ("layer", "metric", "n", "spearman", "low", "high")
LEVEL = 0.95


def agreement(table: pd.DataFrame, metrics: Sequence[str], truth: str = "damage", draws: int = 200, seed: int = 0) -> pd.DataFrame:
    """One row per layer and metric: n, Spearman's correlation with the damage, and the bounds of its 95 % bootstrap interval.

    table: one row per unit, with the index level ``layer``. There are also rows for all units pooled and for the mean over layers.
    Resampled are units, within their layers; the bounds are percentiles of the draws. NaN for fewer than three units with a value
    or a constant, and bounds for fewer than two draws.
    """
    by_layer = [(str(layer), rows) for layer, rows in table.groupby(level="layer", sort=False)]
    rows: list[dict[str, Any]] = []
    for metric in metrics:
        found = {layer: resampled(part[metric], part[truth], draws, seed, layer) for layer, part in by_layer}
        rows += [_row(layer, metric, *each) for layer, each in found.items()]
        if len(by_layer) > 1:
            rows.append(_row(POOLED, metric, *resampled(table[metric], table[truth], draws, seed, POOLED)))
            known = [(value, drawn) for _, value, drawn in found.values() if np.isfinite(value)]
            mean = np.mean([value for value, _ in known]) if known else np.nan
            drawn = np.mean([drawn for _, drawn in known], 0) if known else np.zeros(0)
            rows.append(_row(MEAN, metric, sum(n for n, _, _ in found.values()), float(mean), drawn))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def ranking(
    table: pd.DataFrame,
    agreed: pd.DataFrame,
    metrics: Sequence[str],
    budget: float,
    truth: str = "damage",
) -> pd.DataFrame:
    """One row per metric, the best first: by Spearman's correlation over all units.

    Columns: spearman, low, high over all units; mean_over_layers, worst_layer, best_layer; spearman_size, the correlation with the
    size of the damage; recall, the share of the units with most damage that are among as many with the largest values, at the
    budget, with its chance level; n.
    """
    several = POOLED in set(agreed["layer"])
    place = POOLED if several else (agreed["layer"].iloc[0] if len(agreed) else POOLED)
    pooled = agreed[agreed["layer"] == place].set_index("metric")
    own = agreed[~agreed["layer"].isin([POOLED, MEAN])].groupby("metric")["spearman"]
    found = hits(table, metrics, truth, (budget,))
    found = found[found["layer"] == (POOLED if several else place)].set_index("score")
    rows = {
        metric: {
            **pooled.loc[metric, ["spearman", "low", "high"]].to_dict(),
            "mean_over_layers": own.mean()[metric],
            "worst_layer": own.min()[metric],
            "best_layer": own.max()[metric],
            "spearman_size": spearman(table[metric], table[truth].abs()),
            "recall": found.loc[metric, "hits"],
            "chance": found.loc[metric, "chance"],
            "n": int(pooled.loc[metric, "n"]),
        }
        for metric in metrics
    }
    ranked = pd.DataFrame.from_dict(rows, orient="index").rename_axis("metric")
    return ranked.sort_values("spearman", ascending=False, kind="stable") if len(ranked) else ranked


def resampled(score: pd.Series, truth: pd.Series, draws: int, seed: int, layer: str) -> tuple[int, float, np.ndarray]:
    """Number of units, Spearman's correlation, and that of each draw, (draws,); the same draws for all metrics of a layer."""
    a, b = score.to_numpy(float), truth.to_numpy(float)
    known = np.isfinite(a) & np.isfinite(b)
    a, b = a[known], b[known]
    n = len(a)
    if n < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return n, float("nan"), np.full(draws, np.nan)
    at = torch.randint(n, (draws, n), generator=generator(seed, "bootstrap", layer)).numpy()
    return n, spearman(a, b), correlations(rankdata(a[at], axis=1), rankdata(b[at], axis=1))


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each row, (draws, n) -> (draws,); NaN for a constant row."""
    a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
    size = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return np.divide((a * b).sum(1), size, out=np.full(len(a), np.nan), where=size > 0)


def interval(drawn: np.ndarray) -> tuple[float, float]:
    """The bounds of the 95 % interval of draws; NaN for fewer than two that are numbers."""
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(drawn) > 1 else (np.nan, np.nan)
    return float(low), float(high)


def _row(layer: str, metric: str, n: int, value: float, drawn: np.ndarray) -> dict[str, Any]:
    low, high = interval(drawn)
    return {"layer": layer, "metric": metric, "n": n, "spearman": value, "low": low, "high": high}
