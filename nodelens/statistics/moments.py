"""Sums per unit: moments, absolute values and zeros."""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from .base import Statistic
from .linalg import constant
from .rows import Rows
from .sample_sums import SampleSums

_NOISE = 4 * torch.finfo(torch.float32).eps  # relative rounding error of a sum of squares


@dataclass(frozen=True, eq=False)
class Moments(Statistic):
    """Count, sum and sum of squares of each unit, about a shift."""

    shifts: ClassVar = ("shift",)
    by_sample: ClassVar[str | None] = "squares"
    n: Tensor  # (1,)  int64    rows
    shift: Tensor  # (d,)  float64  a guess of the mean
    total: Tensor  # (d,)  float64  sum of x - shift
    square: Tensor  # (d,)  float64  sum of (x - shift)^2

    @classmethod
    def of(cls, x: Rows | SampleSums | Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        rows = x if isinstance(x, SampleSums) else Rows.of(x, weights, shift)
        return cls(rows.n, rows.shift, rows.total, rows.square)

    def about(self, shift: Tensor) -> Self:
        step = self.shift - shift
        square = self.square + 2 * step * self.total + self.n * step.square()
        return type(self)(self.n, shift, self.total + self.n * step, square)

    @property
    def mean(self) -> Tensor:
        """(d,), in the unit of x; NaN without rows."""
        return self.shift + self.total / self.n

    @property
    def variance(self) -> Tensor:
        """Unbiased variance, (d,), in the unit of x squared; NaN below two rows."""
        return (self.square - self.total.square() / self.n).clamp_min(0) / free(self.n)

    @property
    def mean_square(self) -> Tensor:
        """Mean of x^2, (d,); 0 if it is within the rounding error of the sums about the shift, NaN without rows."""
        value, size = self.about(shift=torch.zeros_like(self.shift)).square, self.square + self.n * self.shift.square()
        return value.where((value > _NOISE * size) | (self.n == 0), 0.0) / self.n


@dataclass(frozen=True, eq=False)
class Higher(Moments):
    """Moments, and sums of the third and fourth powers."""

    by_sample: ClassVar[str | None] = "fourths"
    cube: Tensor  # (d,)  float64  sum of (x - shift)^3
    fourth: Tensor  # (d,)  float64  sum of (x - shift)^4

    @classmethod
    def of(cls, x: Rows | SampleSums | Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        rows = x if isinstance(x, SampleSums) else Rows.of(x, weights, shift).by_sample("fourths")
        return cls(rows.n, rows.shift, rows.total, rows.square, rows.cube, rows.fourth)

    def about(self, shift: Tensor) -> Self:
        a, n = self.shift - shift, self.n
        square = self.square + 2 * a * self.total + n * a**2
        cube = self.cube + 3 * a * self.square + 3 * a**2 * self.total + n * a**3
        fourth = self.fourth + 4 * a * self.cube + 6 * a**2 * self.square + 4 * a**3 * self.total + n * a**4
        return type(self)(n, shift, self.total + n * a, square, cube, fourth)

    @property
    def skewness(self) -> Tensor:
        """m3 / m2^1.5 of the central moments, (d,); 0 for a symmetric unit, NaN below two rows and for a constant unit."""
        return self._central("cube") / self._central("square") ** 1.5

    @property
    def kurtosis(self) -> Tensor:
        """m4 / m2^2 of the central moments, (d,); 3 for a Gaussian, NaN below two rows and for a constant unit."""
        return self._central("fourth") / self._central("square").square()

    def _central(self, power: str) -> Tensor:
        value = getattr(self.about(shift=self.mean), power) / self.n
        # if the shift is not the mean of the rows (a group is left out), variances below the rounding error are not resolved
        resolved = self.variance * (self.n - 1) > _NOISE * self.square
        return value.where(resolved & ~constant(self.variance, self.mean), math.nan)


@dataclass(frozen=True, eq=False)
class Sizes(Statistic):
    """Count and sum of |x| of each unit."""

    by_sample: ClassVar = "absolutes"
    n: Tensor  # (1,)  int64    rows
    absolute: Tensor  # (d,)  float64  sum of |x|

    @classmethod
    def of(cls, x: Rows | SampleSums | Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        rows = x if isinstance(x, SampleSums) else Rows.of(x, weights, shift)
        return cls(rows.n, rows.absolute)


@dataclass(frozen=True, eq=False)
class MeanSizes(Statistic):
    """Count of samples, and the sum over samples of the squared mean of |x| over the positions of a sample."""

    by_sample: ClassVar = "absolutes"
    n: Tensor  # (1,)  int64    samples with at least one row
    square: Tensor  # (d,)  float64  sum of (mean of |x|)^2

    @classmethod
    def of(cls, x: Rows | SampleSums | Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        sums = x if isinstance(x, SampleSums) else Rows.of(x, weights, shift).by_sample("absolutes")
        means = sums.tables()["absolutes"].double() / sums.counts.clamp_min(1)
        return cls((sums.counts > 0).sum().reshape(1), means.square().sum(0))


@dataclass(frozen=True, eq=False)
class Zeros(Statistic):
    """Count of rows and of exact zeros of each unit."""

    by_sample: ClassVar = "nonzeros"
    n: Tensor  # (1,)  int64  rows
    zeros: Tensor  # (d,)  int64  values that are 0

    @classmethod
    def of(cls, x: Rows | SampleSums | Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        rows = x if isinstance(x, SampleSums) else Rows.of(x, weights, shift)
        return cls(rows.n, rows.n - rows.nonzero)


def free(n: Tensor) -> Tensor:
    """Degrees of freedom, n - 1, float64; NaN below two rows."""
    return torch.where(n > 1, n.double() - 1, math.nan)
