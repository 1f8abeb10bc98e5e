"""Histograms of values as they come: not finite, all equal, or equal up to rounding."""

from typing import Any

import numpy as np


def histogram(values: Any, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts (bins,) and edges (bins + 1,) of the finite values, in bins of equal width. Without a finite value all counts are 0.

    Values that are too close for so many bins, such as those that differ by rounding, are around the middle of a range of width 1,
    or of the smallest width that their precision can divide. numpy refuses these.

    >>> histogram([0.3, 0.3 + 1e-16, float("nan")], 4)[0].tolist()
    [0, 1, 1, 0]
    """
    finite = np.asarray(values, dtype=float).ravel()
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return np.zeros(bins, dtype=int), np.linspace(0, 1, bins + 1)
    low, high = finite.min() / 4, finite.max() / 4  # the difference of the largest numbers is no number
    least = 4 * bins * np.spacing(max(abs(low), abs(high)))
    if high - low < least:
        middle, reach = (low + high) / 2, max(0.125, least)
        low, high = middle - reach, middle + reach
    counts, edges = np.histogram(finite / 4, bins, (low, high))
    return counts, np.clip(4 * edges, -np.finfo(float).max, np.finfo(float).max)
