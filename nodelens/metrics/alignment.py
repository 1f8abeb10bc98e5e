"""How a unit's weights are aligned with the variance of its inputs."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nodelens.statistics import ByClass, Moments, Patches, PatchesByClass
from nodelens.statistics.linalg import constant

from .base import Metric
from .need import Need
from .weight_values import squared_norms


@dataclass(frozen=True)
class _Quotient(Metric):
    """Options and formula shared by the Rayleigh quotients."""

    weighted: ClassVar = True
    limits: ClassVar = {"regularization": (lambda size: size >= 0, "it must be 0 or more")}
    relative: bool = True
    regularization: float = 0.0

    def quotient(self, weight: Tensor, along: Tensor, inputs: tuple[Tensor, Tensor] | None) -> Tensor:
        """The quotient of units (units, fan_in) whose outputs have the variance ``along`` (..., units).

        inputs: variance and mean of the layer's inputs, (..., d), or None unless the quotient is relative.
        """
        units, fan_in = weight.shape
        if units != along.shape[-1]:
            raise ValueError(f"the weight has {units} units, the rows are {along.shape[-1]} wide")
        raw = along / squared_norms(weight) + self.regularization
        if inputs is None:
            return raw
        variance, mean = inputs
        entries, groups = variance.shape[-1], variance.shape[-1] // fan_in
        if entries % fan_in or units % max(groups, 1):
            raise ValueError(f"the weight reads {fan_in} inputs, the rows are {entries} wide")
        varies = variance.where(~constant(variance, mean), variance * 0)
        trace = varies.unflatten(-1, (groups, fan_in)).sum(-1) + self.regularization * fan_in
        return raw / trace.where(trace > 0, torch.nan).repeat_interleave(units // groups, -1)


@dataclass(frozen=True)
class RayleighQuotient(_Quotient):
    """Share of the input variance that lies along each unit's weights.

    w'Cw is the variance of the unit's output before any norm or activation, so the covariance C is never formed; this holds for a
    Linear and for every convolution. tr C is the total variance of the inputs; for a convolution, of its patch entries (each group
    has its own channels). Both forms give the same ranking within a layer; use the relative form to compare layers.
    ``regularization`` r gives w'Cw/w'w + r and tr C + r d.

    Formula: w'Cw / (w'w tr C), w the unit's weights, C the covariance of its inputs; ``relative: false``: w'Cw / w'w
    Shapes: weight (units, d), y over rows of width units, x over rows of width d -> (units,)
    Unit:   none, in [0, 1], 1/d for white input; ``relative: false``: that of x squared, at most the largest eigenvalue of C
    NaN:    a unit whose weights are all zero; every unit when the input is constant
    Raises: ValueError when weight and rows differ in width, or regularization is below 0
    Source: Golub & Van Loan 2013, Matrix Computations, 4th ed., section 8.2
    """

    names: ClassVar = ("rayleigh_quotient", "rq")
    log_interval: ClassVar = True
    nan: ClassVar = "the unit's weights are all zero, the input does not vary, or there are fewer than two rows"

    def needs(self) -> dict[str, Need]:
        output = {"y": Need(Moments, "projection")}
        return output | {"x": Need(Patches, "input")} if self.relative else output

    def __call__(self, weight: Tensor, y: Moments, x: Moments | None = None) -> Tensor:
        return self.quotient(weight, y.variance, None if x is None else (x.variance, x.mean))


@dataclass(frozen=True)
class ConditionalRayleighQuotient(_Quotient):
    """Mean Rayleigh quotient within classes: how much input variance a unit keeps that the class does not explain.

    A label holds for all positions of its sample. Classes with fewer than two rows are excluded from the sum and from the shares,
    and ``classes_left_out`` counts them. The relative form divides each class by its own tr C_c. Options are those of
    ``rayleigh_quotient``.

    Formula: sum over classes c of p_c RQ_c, p_c = n_c/n, RQ_c = w'C_c w / (w'w tr C_c), C_c the inputs' covariance in class c
    Shapes: weight (units, d), y over rows of width units and x over rows of width d, by class -> (units,)
    Unit:   none, in [0, 1], 1/d for inputs white in each class; ``relative: false``: that of x squared
    NaN:    a unit whose weights are all zero; every unit when no class has two rows or the input is constant within a class
    Raises: ValueError when weight and rows differ in width, regularization is below 0, or there are no labels
    Source: definition; Golub & Van Loan 2013, Matrix Computations, 4th ed., section 8.2
    """

    names: ClassVar = ("conditional_rayleigh_quotient", "conditional_rq")
    log_interval: ClassVar = True
    nan: ClassVar = "the unit's weights are all zero, no class has two rows, or the input does not vary in a class"

    def needs(self) -> dict[str, Need]:
        output = {"y": Need(ByClass, "projection", "positions", "label")}
        return output | {"x": Need(PatchesByClass, "input", "positions", "label")} if self.relative else output

    def __call__(self, weight: Tensor, y: ByClass, x: PatchesByClass | None = None) -> Tensor:
        seen, inputs = y.n > 1, None
        if x is not None:
            classes = max(len(y.n), len(x.n))
            y, x = y.widen(classes), x.widen(classes)
            seen = (y.n > 1) & (x.n > 1)
            x = x.only(seen)
            inputs = x.variance(), x.mean
        y = y.only(seen)
        within = self.quotient(weight, y.variance(), inputs)
        return y.n.double() @ within / y.n.sum()

    def counts(self, weight: Tensor, y: ByClass, x: PatchesByClass | None = None) -> dict[str, int]:
        return {"classes_left_out": int((y.n == 1).sum())}


@dataclass(frozen=True)
class DeltaRayleighQuotient(_Quotient):
    """The part of a unit's Rayleigh quotient that differences between class means explain: high for units that separate classes.

    The relative form is a difference of shares of two different traces and may be negative. The other form may be slightly negative
    where the class means are equal, because each class variance uses ddof 1. Two classes with shares p and 1 - p that differ only
    in their means, by D along w, give p (1 - p) D^2 with ``relative: false``. Options are those of ``rayleigh_quotient``.

    Formula: RQ - sum over classes c of p_c RQ_c, the quotient over all rows with a class minus that within classes
    Shapes: weight (units, d), y over rows of width units and x over rows of width d, by class -> (units,)
    Unit:   none, in [-1, 1]; ``relative: false``: that of x squared. Identical classes: 0
    NaN:    where either quotient is NaN
    Raises: ValueError when weight and rows differ in width, regularization is below 0, or there are no labels
    Source: definition; law of total variance, Casella & Berger 2002, Statistical Inference, 2nd ed., theorem 4.4.7
    """

    names: ClassVar = ("delta_rq", "delta_rayleigh_quotient")
    nan: ClassVar = "the unit's weights are all zero, no class has two rows, or the input does not vary in a class"

    def needs(self) -> dict[str, Need]:
        return self._parts()[1].needs()

    def __call__(self, weight: Tensor, y: ByClass, x: PatchesByClass | None = None) -> Tensor:
        every, within = self._parts()
        return every(weight, y.moments, None if x is None else x.moments) - within(weight, y, x)

    def counts(self, weight: Tensor, y: ByClass, x: PatchesByClass | None = None) -> dict[str, int]:
        return self._parts()[1].counts(weight, y)

    def _parts(self) -> tuple[RayleighQuotient, ConditionalRayleighQuotient]:
        return RayleighQuotient(**self.options), ConditionalRayleighQuotient(**self.options)


@dataclass(frozen=True)
class DeltaAlignment(_Quotient):
    """Share of the input variance that lies along the change of each unit's weights in training.

    dw'C dw is the variance of the output that the layer would have with the weight change as its weight. Options are those of
    ``rayleigh_quotient``.

    Formula: dw'C dw / (dw'dw tr C), dw = w - w_0, w_0 the unit's initial weights; ``relative: false``: without tr C
    Shapes: change (units, d), y over rows of the output it would give, x over rows of width d -> (units,)
    Unit:   none, in [0, 1], 1/d for white input or a random change; ``relative: false``: that of x squared
    NaN:    a unit whose weights have not changed; every unit when the input is constant
    Raises: ValueError when the initial weights are missing, widths differ, or regularization is below 0
    Source: Golub & Van Loan 2013, Matrix Computations, 4th ed., section 8.2
    """

    names: ClassVar = ("delta_alignment",)
    parameter: ClassVar = "change"
    nan: ClassVar = "the unit's weights have not changed, the input does not vary, or there are fewer than two rows"

    def needs(self) -> dict[str, Need]:
        output = {"y": Need(Moments, "change")}
        return output | {"x": Need(Patches, "input")} if self.relative else output

    def __call__(self, weight: Tensor, y: Moments, x: Patches | None = None) -> Tensor:
        return self.quotient(weight, y.variance, None if x is None else (x.variance, x.mean))
