"""How a unit's weights lie to the variance of what it reads."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..linalg import constant
from ..statistics import Moments, Patches
from .base import Metric, Need


@dataclass(frozen=True)
class RayleighQuotient(Metric):
    """Share of the input variance along each unit's weights: w'Cw / (w'w tr C), C the covariance of what the unit reads.

    w'Cw is the variance of the unit's own output before any norm or activation, so no covariance is formed, for a Linear
    and for a convolution of any stride, padding, dilation or groups alike; tr C is the summed variance of the inputs, of
    a convolution that of its patch entries (a group sees its own channels). Within a layer the two forms rank alike;
    compare layers by the relative one. ``regularization`` r gives w'Cw/w'w + r and tr C + r d.

    Shapes: weight (units, d), y over rows of width units, x over rows of width d -> (units,)
    Unit:   none, in [0, 1], 1/d for white input; ``relative: false``: that of x squared, at most C's first eigenvalue
    NaN:    a unit whose weights are all zero; every unit when the input does not vary
    Raises: ValueError when weight and rows differ in width, or regularization is below 0
    Source: Golub & Van Loan 2013, Matrix Computations, 4th ed., section 8.2
    """

    names: ClassVar = ("rayleigh_quotient", "rq")
    weighted: ClassVar = True
    nan: ClassVar = "the unit's weights are all zero, the input does not vary, or there are fewer than two rows"
    relative: bool = True
    regularization: float = 0.0

    def needs(self) -> dict[str, Need]:
        output = {"y": Need(Moments, "output")}
        return output | {"x": Need(Patches, "input")} if self.relative else output

    def __call__(self, weight: Tensor, y: Moments, x: Patches | None = None) -> Tensor:  # type: ignore[override]
        units, fan_in = weight.shape
        if units != len(y.total):
            raise ValueError(f"the weight has {units} units, the rows are {len(y.total)} wide")
        if self.regularization < 0:
            raise ValueError(f"regularization is {self.regularization}; it is added to a variance: 0 or more")
        raw = y.variance / weight.double().square().sum(1) + self.regularization
        if not self.relative:
            return raw
        assert x is not None  # the plan gives what needs() names
        entries, groups = len(x.total), len(x.total) // fan_in
        if entries % fan_in or units % max(groups, 1):
            raise ValueError(f"the weight reads {fan_in} inputs, the rows are {entries} wide")
        varies = x.variance.where(~constant(x.variance, x.mean), x.variance * 0)
        trace = varies.reshape(groups, fan_in).sum(1) + self.regularization * fan_in
        return raw / trace.repeat_interleave(units // groups)
