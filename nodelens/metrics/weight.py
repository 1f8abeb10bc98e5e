"""What can be said of a unit without data."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .base import Metric


@dataclass(frozen=True)
class WeightMagnitude(Metric):
    """Norm of a unit's weights, ||w||_p; the bias is left out. Has no standard error: no data are read.

    Shapes: weight (units, d) -> (units,)
    Unit:   that of the weights, >= 0; d entries N(0, 1), p = 2: about sqrt(d)
    NaN:    never
    Source: Li et al. 2017, 1608.08710, section 3 (p = 1)
    """

    names: ClassVar = ("weight_magnitude", "magnitude")
    weighted: ClassVar = True
    p: Literal[1, 2] = 2

    def __call__(self, weight: Tensor) -> Tensor:  # type: ignore[override]
        return torch.linalg.vector_norm(weight.double(), ord=self.p, dim=1)
