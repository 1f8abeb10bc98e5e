"""Comparison of criteria: accuracy or perplexity against the share of cost saved, and the area under each curve."""

import numpy as np
import pandas as pd

KEY = ["criterion", "allocation", "compensate", "mode"]


def measure_of(table: pd.DataFrame) -> str:
    """The measure of a sweep: ``perplexity`` for language models (lower is better), else ``accuracy``."""
    return "perplexity" if "perplexity" in table else "accuracy"


def best_first(values: pd.Series, measure: str) -> pd.Series:
    """Sorted, the best first; ties keep their order."""
    return values.sort_values(ascending=measure in ("perplexity", "loss"), kind="stable")


def curves(table: pd.DataFrame, measure: str | None = None, saved: str = "macs") -> pd.DataFrame:
    """Mean and standard deviation over seeds, index (criterion, allocation, compensate, mode, amount).

    Columns mean, std, seeds, and saved: the mean share of ``macs``, ``params`` or ``units`` removed. Infeasible cells, which have
    no value, do not count.
    """
    measure = measure or measure_of(table)
    table = table.assign(saved=removed_share(table, saved)).dropna(subset=[measure])
    by = table.groupby([*KEY, "amount"], sort=False)
    return by[measure].agg(mean="mean", std="std", seeds="count").join(by["saved"].mean())


def areas(table: pd.DataFrame, measure: str | None = None, saved: str = "macs") -> pd.DataFrame:
    """Area under each mean curve, best first: index (criterion, allocation, compensate, mode), columns area and upto.

    The area from share 0 (the dense model) to ``upto``, the largest share that every curve reaches, divided by ``upto``, with
    linear interpolation between amounts. All curves are thus compared over the same range.
    """
    measure = measure or measure_of(table)
    dense = table[f"dense_{measure}"].iloc[0]
    lines = {}
    for key, curve in curves(table, measure, saved).groupby(level=KEY, sort=False):
        points = curve.sort_values("saved")
        lines[key] = (np.concatenate([[0.0], points["saved"]]), np.concatenate([[dense], points["mean"]]))
    upto = min((float(x[-1]) for x, _ in lines.values()), default=0.0)
    rows = {}
    for key, (x, y) in lines.items():
        inside = x[x < upto]
        grid = np.concatenate([inside, [upto]])
        rows[key] = float(np.trapezoid(np.interp(grid, x, y), grid) / upto) if upto > 0 else float(y.mean())
    area = pd.Series(rows, name="area", dtype=float)
    area.index = pd.MultiIndex.from_tuples(list(rows), names=KEY) if rows else pd.MultiIndex.from_arrays([[]] * 4, names=KEY)
    return best_first(area, measure).to_frame().assign(upto=upto)


def removed_share(table: pd.DataFrame, of: str = "macs") -> pd.Series:
    """The share of MACs, parameters or units removed; of units if MACs were not counted."""
    if of == "units" or (of == "macs" and table["macs_share"].isna().all()):
        return table["units_removed"] / table["units"]
    return 1 - table[f"{of}_share"]
