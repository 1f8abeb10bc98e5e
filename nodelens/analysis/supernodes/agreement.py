"""Agreement of scores with the measured change of the loss: rank correlations with errors, hit rates among the largest units."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from nodelens.metrics.supernode import share_of
from nodelens.statistics.sample_hash import generator

BUDGETS = (0.005, 0.01, 0.02, 0.05, 0.1)
GROUPS = 20  # groups of units for the jackknife
POOLED, MEAN = "all layers pooled", "mean over layers"


def spearman(a: Any, b: Any) -> float:
    """Spearman's rank correlation over finite pairs, ties averaged; NaN for fewer than two pairs or a constant."""
    a, b = _finite_pairs(a, b)
    return pearson(pd.Series(a).rank(), pd.Series(b).rank())


def pearson(a: Any, b: Any) -> float:
    """Pearson's correlation over finite pairs; NaN for fewer than two pairs or a constant."""
    a, b = _finite_pairs(a, b)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    a, b = ((x - x.mean()) / np.abs(x - x.mean()).max() for x in (a, b))  # squares of tiny values would underflow
    return float((a @ b) / np.sqrt((a @ a) * (b @ b)))


def agreement(table: pd.DataFrame, scores: Sequence[str], against: str = "change", seed: int = 0) -> pd.DataFrame:
    """One row per layer and score: n, spearman and pearson with the column ``against``, each with a standard error.

    table: one row per unit, with the index level ``layer``. There are also rows for all units pooled and for the mean over layers.
    Errors: jackknife over 20 groups of units drawn from the seed; that of the mean assumes independent layers.
    """
    by_layer = [(str(layer), rows) for layer, rows in table.groupby(level="layer", sort=False)]
    places = by_layer if len(by_layer) == 1 else [*by_layer, (POOLED, table)]
    pairs = [(score, layer, rows) for score in scores for layer, rows in places]
    found = [{"layer": layer, "score": score} | _correlate(rows[score], rows[against], seed, layer) for score, layer, rows in pairs]
    every = pd.DataFrame(found, columns=["layer", "score", "n", "spearman", "spearman_se", "pearson", "pearson_se"])
    if len(by_layer) == 1:
        return every
    own = every[every["layer"] != POOLED].groupby("score", sort=False)
    return pd.concat([every, pd.DataFrame([_mean(score, rows) for score, rows in own])], ignore_index=True)


def hits(table: pd.DataFrame, scores: Iterable[str], against: str = "change", budgets: Sequence[float] = BUDGETS) -> pd.DataFrame:
    """One row per layer, score and budget: share of the k largest units by ``against`` that are among the k largest by the score.

    A budget is a share of the n units, k of them, at least one; chance is k / n. Ties go to the lower unit.
    """
    by_layer = [(str(layer), rows) for layer, rows in table.groupby(level="layer", sort=False)]
    rows = []
    for layer, part in by_layer if len(by_layer) == 1 else [*by_layer, (POOLED, table)]:
        order = {name: _order(part[name]) for name in (*scores, against)}
        for score in scores:
            for budget in budgets:
                k = share_of(len(part), budget)
                both = len({*order[score][:k].tolist()} & {*order[against][:k].tolist()})
                rows.append({"layer": layer, "score": score, "budget": budget, "k": k, "hits": both / k, "chance": k / len(part)})
    return pd.DataFrame(rows, columns=["layer", "score", "budget", "k", "hits", "chance"])


def _correlate(score: pd.Series, truth: pd.Series, seed: int, layer: str) -> dict[str, Any]:
    a, b = _finite_pairs(score, truth)
    order = torch.randperm(len(a), generator=generator(seed, "jackknife", layer)).numpy()
    parts = [part for part in np.array_split(order, GROUPS) if len(part)]
    found: dict[str, Any] = {"n": len(a)}
    for name, function in (("spearman", spearman), ("pearson", pearson)):
        left = np.array([function(np.delete(a, part), np.delete(b, part)) for part in parts])
        found[name] = function(a, b)
        found[f"{name}_se"] = np.sqrt((len(left) - 1) * left.var()) if len(a) >= 2 * GROUPS else np.nan
    return found


def _mean(score: Any, rows: pd.DataFrame) -> dict[str, Any]:
    found: dict[str, Any] = {"layer": MEAN, "score": score, "n": rows["n"].sum()}
    for name in ("spearman", "pearson"):
        known = rows[rows[name].notna()]
        found[name] = known[name].mean()
        found[f"{name}_se"] = np.sqrt((known[f"{name}_se"] ** 2).sum(skipna=False)) / max(1, len(known))
    return found


def _order(values: pd.Series) -> np.ndarray:
    """Indices in descending order of the values; NaN last."""
    return np.argsort(-values.fillna(-np.inf).to_numpy(float), kind="stable")


def _finite_pairs(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, float), np.asarray(b, float)
    known = np.isfinite(a) & np.isfinite(b)
    return a[known], b[known]
