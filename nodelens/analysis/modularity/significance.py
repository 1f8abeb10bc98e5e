"""Whether a modularity is larger than that of a null model: mean, z and p."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Significance:
    """A value beside those of a null model.

    mean, std: of the null values, NaN without any
    z:         (value - mean) / std; NaN where the null values do not vary
    p:         one-sided: (1 + number of null values >= value) / (1 + number of null values)
    """

    mean: float
    std: float
    z: float
    p: float

    @classmethod
    def of(cls, value: float, null: Iterable[float]) -> "Significance":
        """Compares a value with null values. Values that differ by rounding are ties, which count as large."""
        drawn = np.array(list(null), dtype=np.float64)
        if not len(drawn) or np.isnan(value):
            return cls(*[float("nan")] * 4)
        ties = 1e-9 * max(1.0, abs(value))
        spread = float(drawn.std(ddof=1)) if len(drawn) > 1 else 0.0
        z = (value - float(drawn.mean())) / spread if spread > ties else float("nan")
        return cls(float(drawn.mean()), spread, z, float((1 + (drawn >= value - ties).sum()) / (1 + len(drawn))))
