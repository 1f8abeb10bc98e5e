"""How a unit's activation differs between classes."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nodelens.statistics import ByClass, ClassSizes

from .base import Metric
from .need import Need


@dataclass(frozen=True)
class ConditionalActivationNorm(Metric):
    """Root mean square of a unit's activation within each class, aggregated over the classes that have rows.

    ``aggregation`` is mean, max, variance (ddof 1) or ratio (max / min); all classes have equal weight. ``normalize`` divides the
    result by the unit's root mean square over all labelled rows; it does not change a ratio. The normalized variance still grows
    with the unit's scale, because a variance has the unit of y squared.

    Formula: mean over classes c of r_c / sqrt(E y^2), r_c = sqrt(E[y^2|c]), y the unit's output, E the mean over rows
    Shapes: y over rows of width units, by class -> (units,)
    Unit:   none, >= 0; that of y for ``variance`` or without ``normalize``, squared for both. Identical classes: 1 (variance 0)
    NaN:    no rows; with ``normalize`` a unit that is always 0; only one class (variance); a class where it is always 0 (ratio)
    Raises: ValueError when there are no labels
    Source: definition
    """

    names: ClassVar = ("conditional_activation_norm",)
    nan: ClassVar = "no rows, a unit that is always 0, only one class (variance), or a class in which the unit is always 0 (ratio)"
    aggregation: Literal["mean", "max", "variance", "ratio"] = "mean"
    normalize: bool = True

    def needs(self) -> dict[str, Need]:
        return {"y": Need(ByClass, "output", "samples", "label")}

    def __call__(self, weight: Tensor | None, y: ByClass) -> Tensor:
        y = y.only(y.n > 0)
        if not len(y.n):
            return torch.full_like(y.shift, torch.nan)
        square = y.mean_square.clamp_min(0)
        norms = square.sqrt()
        if self.aggregation == "ratio":
            least = norms.amin(0)
            return norms.amax(0) / least.where(least > 0, torch.nan)
        value = self._over_classes(norms)
        return value / (y.n.double() @ square / y.n.sum()).sqrt() if self.normalize else value

    def _over_classes(self, norms: Tensor) -> Tensor:
        if self.aggregation == "variance":
            return norms.var(0) if len(norms) > 1 else torch.full_like(norms[0], torch.nan)
        return norms.mean(0) if self.aggregation == "mean" else norms.amax(0)


@dataclass(frozen=True)
class ClassSelectivity(Metric):
    """How much larger a unit's activation is in its preferred class than in the others.

    Formula: (m_max - m_rest) / (m_max + m_rest), m_c = E[|y| given class c], m_max the largest, m_rest the mean of the others
    Shapes: |y| over rows of width units, by class -> (units,)
    Unit:   none, in [0, 1]; 0 for identical classes, 1 for a unit active in one class only. Classes without rows are ignored
    NaN:    a unit that is always 0; fewer than two classes
    Raises: ValueError when there are no labels
    Source: Morcos et al. 2018, 1803.06959, "Quantifying class selectivity" (there after a ReLU)
    """

    names: ClassVar = ("class_selectivity",)
    nan: ClassVar = "the unit is always 0, or there are fewer than two classes"

    def needs(self) -> dict[str, Need]:
        return {"y": Need(ClassSizes, "output", "samples", "label")}

    def __call__(self, weight: Tensor | None, y: ClassSizes) -> Tensor:
        means = y.only(y.n > 0).mean.sort(0).values
        if len(means) < 2:
            return y.absolute.new_full(y.absolute.shape[1:], torch.nan)
        most, rest = means[-1], means[:-1].mean(0)
        return (most - rest) / (most + rest)
