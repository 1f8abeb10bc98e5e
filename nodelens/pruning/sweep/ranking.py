"""Comparison of criteria: accuracy or perplexity against the share of cost saved, and the area under each curve."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

KEY = ["criterion", "allocation", "compensate", "mode"]


def measure_of(table: pd.DataFrame) -> str:
    """The measure of a sweep: ``perplexity`` for language models (lower is better), else ``accuracy``."""
    return "perplexity" if "perplexity" in table else "accuracy"


def best_first(values: pd.Series, measure: str) -> pd.Series:
    """Sorted, the best first and NaN last; ties keep their order."""
    return values.sort_values(ascending=measure in ("perplexity", "loss"), kind="stable")


def curves(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds, index (criterion, allocation, compensate, mode, amount).

    Columns mean, std, seeds, and saved: the mean share of MACs removed, or of units if MACs were not counted. Infeasible cells do
    not count. A loss or perplexity that is infinite or NaN is a value, and so is then the mean over its seeds.
    """
    measure = measure_of(table)
    counts = table[measure].notna() if measure.endswith("accuracy") else table["status"] == "done"  # a task may have no accuracy
    table = table.assign(saved=_removed_share(table))[counts]
    by = table.groupby([*KEY, "amount"], sort=False)
    with np.errstate(invalid="ignore"):  # the spread of infinite values
        found = by[measure].agg(mean=lambda seeds: seeds.mean(skipna=False), std="std", seeds="size")
    return found.join(by["saved"].mean())


def areas(table: pd.DataFrame) -> pd.DataFrame:
    """Area under each mean curve, best first: index (criterion, allocation, compensate, mode), columns area and upto.

    The area from share 0 (the dense model) to ``upto``, the largest share that every curve reaches, divided by ``upto``, with
    linear interpolation between amounts. All curves are thus compared over the same range. The area is NaN or infinite if the curve
    is so within this range.
    """
    measure = measure_of(table)
    dense = table[f"dense_{measure}"].iloc[0]
    lines = {}
    for key, curve in curves(table).groupby(level=KEY, sort=False):
        points = curve.sort_values("saved")
        lines[key] = (np.concatenate([[0.0], points["saved"]]), np.concatenate([[dense], points["mean"]]))
    upto = min((float(x[-1]) for x, _ in lines.values()), default=0.0)
    rows = {}
    for key, (x, y) in lines.items():
        inside = x[x < upto]
        rows[key] = _mean_height(x, y, np.concatenate([inside, [upto]])) if upto > 0 else float(y.mean())
    area = pd.Series(rows, name="area", dtype=float)
    area.index = pd.MultiIndex.from_tuples(list(rows), names=KEY) if rows else pd.MultiIndex.from_arrays([[]] * 4, names=KEY)
    return best_first(area, measure).to_frame().assign(upto=upto)


def _mean_height(x: np.ndarray, y: np.ndarray, grid: np.ndarray) -> float:
    """The mean of a curve over a grid that starts at 0: infinite, or NaN, if a value up to the end of the grid is so."""
    reached = y[: int(np.searchsorted(x, grid[-1])) + 1]
    if not np.isfinite(reached).all():
        return math.nan if np.isnan(reached).any() else float(reached.sum())
    return float(np.trapezoid(np.interp(grid, x, y), grid) / grid[-1])


def best_cell(table: pd.DataFrame) -> pd.Series | None:
    """The row of the finished cell that is best on validation data at the largest amount; None if no cell is finished."""
    finished = table[(table["status"] == "done") & (table["amount"] == table["amount"].max())]
    lower = "val_loss" if measure_of(table) == "perplexity" else "params_share"
    measure = "val_accuracy" if lower == "params_share" and finished["val_accuracy"].notna().any() else lower
    ordered = finished.sort_values(measure, ascending=measure != "val_accuracy", kind="stable")
    return ordered.iloc[0] if len(ordered) else None


def score_of(table: pd.DataFrame, score: str | Sequence[str] = "area") -> float | tuple[float, ...]:
    """What a sweep is worth to a search over its options: the area under the best curve, or columns of its best cell.

    score: ``area``, or names of columns, such as val_accuracy and macs_share, whose values of ``best_cell`` are returned. Raises
    ValueError for a name that is no column of numbers.
    """
    if score == "area":
        return float(areas(table)["area"].iloc[0]) if table["accuracy"].notna().any() else math.nan
    names, best = [score] if isinstance(score, str) else list(score), best_cell(table)
    numbers = [str(name) for name in table.select_dtypes("number")]
    if unknown := [name for name in names if name not in numbers]:
        raise ValueError(f"score is {unknown[0]!r}; it is area, or columns of the sweep: {', '.join(numbers)}")
    values = tuple(math.nan if best is None or pd.isna(best[name]) else float(best[name]) for name in names)
    return values[0] if isinstance(score, str) else values


def _removed_share(table: pd.DataFrame) -> pd.Series:
    counted = table["macs_share"].notna().any()
    return 1 - table["macs_share"] if counted else table["units_removed"] / table["units"]
