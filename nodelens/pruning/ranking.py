"""How criteria compare: the area under each one's curve."""

import numpy as np
import pandas as pd


def curves(table: pd.DataFrame, measure: str = "accuracy") -> pd.DataFrame:
    """Mean and standard deviation over seeds, index (criterion, amount), columns mean, std, seeds."""
    by = table.groupby(["criterion", "amount"], sort=False)[measure]
    return by.agg(mean="mean", std="std", seeds="count")


def areas(table: pd.DataFrame, measure: str = "accuracy") -> pd.Series:
    """Area under the mean curve over amounts from 0 (the dense model) to the largest, divided by that range; best first."""
    found = {}
    for criterion, curve in curves(table, measure)["mean"].groupby(level="criterion", sort=False):
        amounts = curve.index.get_level_values("amount").to_numpy()
        x = np.concatenate([[0.0], amounts]) if amounts[0] > 0 else amounts
        y = np.concatenate([[table[f"dense_{measure}"].iloc[0]], curve.to_numpy()]) if amounts[0] > 0 else curve.to_numpy()
        found[criterion] = float(np.trapezoid(y, x) / (x[-1] - x[0])) if len(x) > 1 else float(y[0])
    return pd.Series(found, name="area").sort_values(ascending=False)
