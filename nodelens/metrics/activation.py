"""How much a unit does: sizes, spreads and silences of its activation."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..statistics import Moments, Sizes, Zeros
from .base import Metric, Need, View


@dataclass(frozen=True)
class ActivationMean(Metric):
    """Mean size of a unit's activation, E|y|; ``absolute: false`` gives the mean itself, E y.

    Shapes: y over rows of width units -> (units,)
    Unit:   that of y; >= 0 with ``absolute``. N(0, 1) rows: 0.7979
    NaN:    no rows
    Source: definition
    """

    names: ClassVar = ("activation_mean", "activation_mean_abs")
    nan: ClassVar = "no rows"
    absolute: bool = True
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Sizes if self.absolute else Moments, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Sizes | Moments) -> Tensor:  # type: ignore[override]
        return y.absolute / y.n if isinstance(y, Sizes) else y.mean


@dataclass(frozen=True)
class ActivationVariance(Metric):
    """Unbiased variance of a unit's activation.

    Shapes: y over rows of width units -> (units,)
    Unit:   that of y squared, >= 0. N(0, 1) rows: 1; behind a ReLU 0.3408
    NaN:    fewer than two rows
    Source: definition
    """

    names: ClassVar = ("activation_variance",)
    nan: ClassVar = "fewer than two rows"
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Moments, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Moments) -> Tensor:  # type: ignore[override]
        return y.variance


@dataclass(frozen=True)
class ActivationNorm(Metric):
    """Root mean square of a unit's activation, sqrt(sum y^2 / n).

    ``normalize: none`` does not divide by n: the value then grows with the square root of the rows.

    Shapes: y over rows of width units -> (units,)
    Unit:   that of y, >= 0. N(0, 1) rows: 1; behind a ReLU 0.7071
    NaN:    no rows, with ``normalize: rows``
    Source: definition
    """

    names: ClassVar = ("activation_l2_norm", "activation_norm", "activation_rms")
    nan: ClassVar = "no rows"
    normalize: Literal["rows", "none"] = "rows"
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Moments, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Moments) -> Tensor:  # type: ignore[override]
        mean_square = y.mean_square.clamp_min(0)
        return (mean_square if self.normalize == "rows" else mean_square * y.n).sqrt()


@dataclass(frozen=True)
class ActivationZeroFraction(Metric):
    """Share of rows in which a unit is exactly zero.

    Shapes: y over rows of width units -> (units,)
    Unit:   none, in [0, 1]. A dead unit behind a ReLU: 1; a unit before its activation: about 0
    NaN:    no rows
    Source: definition; Hu et al. 2016, 1607.03250, eq. 1 (average percentage of zeros)
    """

    names: ClassVar = ("activation_zero_fraction", "zero_fraction")
    nan: ClassVar = "no rows"
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Zeros, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Zeros) -> Tensor:  # type: ignore[override]
        return y.zeros / y.n.double()
