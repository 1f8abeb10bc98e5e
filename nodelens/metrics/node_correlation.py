"""Correlation of the outputs of units, without its sign."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from nodelens.statistics import Gram

from .base import Metric, mean_of_partners
from .covariances import constant_units, correlation_of
from .need import Need, View


@dataclass(frozen=True)
class NodeCorrelation(Metric):
    """Mean absolute correlation of a unit with the other units: like redundancy, on the scale of correlations.

    ``reduce: none`` gives the matrix, with diagonal 0. Constant units have 0, and ``constant`` counts them. Independent units give
    about 0.8/sqrt(n) rather than 0.

    Formula: mean over j != i of |corr(y_i, y_j)|
    Shapes: y over rows of width units -> (units,), or (units, units) with ``reduce: none``
    Unit:   none, in [0, 1]; copies, with either sign: 1
    NaN:    fewer than two rows; the mean in a layer of one unit
    Source: definition
    """

    names: ClassVar = ("node_correlation",)
    kind: ClassVar = "pair"
    nan: ClassVar = "fewer than two rows, or a layer of one unit"
    higher_is_better: ClassVar = False
    reduce: Literal["mean", "none"] = "mean"
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Gram, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Gram) -> Tensor:
        pairs = correlation_of(y).abs().fill_diagonal_(0)
        return mean_of_partners(pairs) if self.reduce == "mean" else pairs

    def counts(self, weight: Tensor | None, y: Gram) -> dict[str, int]:
        return {"constant": int(constant_units(y).sum())}
