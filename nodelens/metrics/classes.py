"""What a unit tells about the class."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..linalg import constant
from ..statistics import ByClass
from .base import Metric, Need

SILENT = 1e-6  # of the variance: a class in which a unit is quieter would have no logarithm


@dataclass(frozen=True)
class ClassInformation(Metric):
    """Information of a unit's activation about the class, 0.5 ln Var - sum_c p_c 0.5 ln Var_c.

    Gaussian within and over classes: a mixture is over-read (classes at -+3, sd 1: 1.151 where the truth is 0.689).
    ``method: pooled`` takes one variance for all classes, -0.5 ln(1 - eta^2), and ddof 0. Not clipped: with ddof 1 a
    unit that tells nothing may fall below 0. Classes of fewer than two rows are left out. A class in which the unit is
    silent (Var_c < 1e-6 Var): 1e-6 Var is added to total and classes alike, counted as ``degenerate``.

    Shapes: y over rows of width units, by class -> (units,)
    Unit:   nats, at most 6.9; N(-1, 1) against N(1, 1): 0.3466. Independent of the class: about (K - 1)/(2n) for
            ``gaussian`` with ddof 1, and for ``pooled``
    NaN:    fewer than two rows in every class
    Raises: ValueError when there are no labels
    Source: definition, Cover & Thomas 2006, ch. 8; pooled: eta^2, Pearson's correlation ratio
    """

    names: ClassVar = ("mi_about_class", "mi_class", "class_mi")
    nan: ClassVar = "no class has two rows"
    method: Literal["gaussian", "pooled"] = "gaussian"
    ddof: Literal[0, 1] = 1

    def needs(self) -> dict[str, Need]:
        return {"y": Need(ByClass, "output", "samples", "label")}

    def __call__(self, weight: Tensor | None, y: ByClass) -> Tensor:  # type: ignore[override]
        total, within, share = self._variances(y)
        mute = (within < SILENT * total).any(0)
        total, within = total + SILENT * total * mute, within + SILENT * total * mute
        if self.method == "pooled":
            within = (share @ within)[None]
            share = share.sum()[None]
        value = 0.5 * (total.log() - share @ within.log())
        value = value.where(~constant(total, self._seen(y).moments.mean), 0.0)
        return value if bool((y.n > 1).any()) else torch.full_like(value, torch.nan)

    def counts(self, weight: Tensor | None, y: ByClass) -> dict[str, int]:  # type: ignore[override]
        total, within, _ = self._variances(y)
        return {"degenerate": int((within < SILENT * total).any(0).sum()), "classes_left_out": int((y.n == 1).sum())}

    def _seen(self, y: ByClass) -> ByClass:
        return y.only(y.n > 1)

    def _variances(self, y: ByClass) -> tuple[Tensor, Tensor, Tensor]:
        """Variance of all rows (units,), within classes (K, units), shares of the classes (K,)."""
        y, ddof = self._seen(y), 0 if self.method == "pooled" else self.ddof
        every = y.moments
        scale = (every.n.double() - 1) / (every.n.double() - ddof)
        return every.variance * scale, y.variance(ddof), y.n / y.n.sum().double()
