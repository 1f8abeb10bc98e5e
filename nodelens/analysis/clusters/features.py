"""The features by which the units of a layer are clustered: columns of a table of units, standardized."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

FLOOR = 1e-10  # Rayleigh quotients below it count as this value before the logarithm
DIGITS = 9  # of standardized features: units that agree to so many decimals are not different


@dataclass(frozen=True, eq=False)
class Features:
    """Values of the units of a layer.

    layer: its name, for messages. names: one per column. values: (units, columns) float64, after the logarithm; a unit with a
    value that is not finite has no cluster.
    """

    layer: str
    names: tuple[str, ...]
    values: np.ndarray

    @classmethod
    def of(cls, layer: str, columns: Mapping[str, Any], log: Iterable[str] = ()) -> "Features":
        """Features from {name: one value per unit}, arrays, lists, series or tensors.

        log: names of columns of which the logarithm is taken. Raises ValueError for columns that are no numbers, of different
        length, or missing.
        """
        if not columns:
            raise ValueError(f"layer {layer!r}: there is no column to cluster by: name some, such as rq, redundancy, synergy")
        arrays = {name: as_column(layer, name, given) for name, given in columns.items()}
        lengths = {name: len(values) for name, values in arrays.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name} {n}" for name, n in lengths.items())
            raise ValueError(
                f"layer {layer!r}: the columns have different numbers of units ({told}): give one value per unit in each"
            )
        logs = set(log)
        found = [np.log(np.maximum(values, FLOOR)) if name in logs else values for name, values in arrays.items()]
        return cls(layer, tuple(arrays), np.stack(found, 1))

    def only(self, names: Sequence[str]) -> "Features":
        """The features of these names."""
        return replace(self, names=tuple(names), values=self.values[:, [self.names.index(name) for name in names]])

    def with_column(self, name: str, values: np.ndarray) -> "Features":
        """The features, and one more."""
        return replace(self, names=(*self.names, name), values=np.column_stack([self.values, values]))

    @property
    def live(self) -> np.ndarray:
        """Which units have a finite value of each feature, (units,) bool."""
        return np.isfinite(self.values).all(1)

    def standardized(self) -> np.ndarray:
        """z-scores (ddof 0) of the live units, (live units, columns); 0 in a column that does not vary."""
        values = self.values[self.live]
        return Scale.of(values)(values)

    def check(self, clusters: int) -> None:
        """Raises ValueError, with the layer and the way out, where the units cannot form so many clusters."""
        points, units = self.standardized(), len(self.values)
        different = distinct(points)
        if different >= clusters:
            return
        if len(points) < clusters:
            gone = units - len(points)
            why = f"it has {len(points)} units with a value of {', '.join(self.names)}" + (f" ({gone} have none)" if gone else "")
        else:
            why = f"only {different} of its {len(points)} units differ in {', '.join(self.names)}"
        way = f"set n_clusters to {different} or less, or leave the layer out" if different > 1 else "leave the layer out"
        raise ValueError(f"layer {self.layer!r} cannot be divided into {clusters} clusters: {why}; {way}")


@dataclass(frozen=True, eq=False)
class Scale:
    """Mean and standard deviation (ddof 0) of each column; a column that does not vary has standard deviation 1."""

    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> "Scale":
        if not len(values):
            return cls(np.zeros(values.shape[1]), np.ones(values.shape[1]))
        mean, deviation = values.mean(0), values.std(0)
        rounding = 1e-12 * np.abs(values).max(0)
        return cls(mean, np.where(deviation > rounding, deviation, 1.0))

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return (values - self.mean) / self.deviation


def distinct(points: np.ndarray) -> int:
    """The number of different rows."""
    return len(np.unique(np.round(points, DIGITS), axis=0)) if len(points) else 0


def as_column(layer: str, name: str, given: Any) -> np.ndarray:
    """One value per unit as float64. Raises ValueError for what is no column of numbers."""
    given = given.detach().cpu().double().numpy() if isinstance(given, Tensor) else given
    try:
        values = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"layer {layer!r}: {name} is no column of numbers: give one number per unit") from None
    if values.ndim != 1:
        raise ValueError(f"layer {layer!r}: {name} has the shape {values.shape}: give one number per unit, (units,)")
    return values
