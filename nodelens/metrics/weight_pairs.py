"""Similarity of the weights of units: products and distances, averaged over the partners."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Metric
from .weight import GeometricMedian


@dataclass(frozen=True)
class WeightDot(Metric):
    """Mean product of a unit's weights with those of the other units: high for units with large weights in the same direction.

    Formula: mean over j != i of w_i.w_j, w_i the weights of unit i
    Shapes: weight (units, d) -> (units,)
    Unit:   that of the weights squared; equal units: ||w||^2; random directions: about 0
    NaN:    a layer of one unit
    Source: definition
    """

    names: ClassVar = ("weight_dot_product",)
    weighted: ClassVar = True
    higher_is_better: ClassVar = False

    def __call__(self, weight: Tensor) -> Tensor:
        w = weight.double()
        others = len(w) - 1
        return (w @ w.sum(0) - w.square().sum(1)) / others if others else w.new_full((1,), torch.nan)


@dataclass(frozen=True)
class WeightDistance(Metric):
    """Mean distance of a unit's weights from those of the other units: small for a unit that others can replace.

    Within a layer it ranks units like ``fpgm``, which is its sum; the mean compares layers of different width.

    Formula: mean over j != i of ||w_i - w_j||, w_i the weights of unit i
    Shapes: weight (units, d) -> (units,)
    Unit:   that of the weights, >= 0; d entries N(0, 1): about sqrt(2 d); equal units: 0
    NaN:    a layer of one unit
    Source: He et al. 2019, 1811.00250, section 3.3, eq. 6, divided by the number of other units
    """

    names: ClassVar = ("weight_euclidean_distance",)
    weighted: ClassVar = True

    def __call__(self, weight: Tensor) -> Tensor:
        others = len(weight) - 1
        return GeometricMedian()(weight) / others if others else weight.new_full((1,), torch.nan, dtype=torch.float64)
