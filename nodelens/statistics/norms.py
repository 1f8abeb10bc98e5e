"""Statistics of row norms and row directions, which a Gram does not contain."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from .base import derived
from .gram import Gram
from .linalg import by_unit, exact_products, side_by_side
from .moments import free
from .rows import NARROW, Rows


@dataclass(frozen=True, eq=False)
class NormedGram(Gram):
    """A Gram, and sums with the squared norm of each row, e = |x - shift|^2; the sum of e is the trace of ``outer``."""

    by_row: ClassVar = ("norms",)
    skew: Tensor  # (d,)    float64  sum of e (x - shift)
    quartic: Tensor  # (1,)    float64  sum of e^2

    @classmethod
    def of(cls, x: Rows | Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        rows = Rows.of(x, weights, shift)
        e = squared_norms(rows)
        return cls(**Gram.of(rows).tensors(), skew=weighted_sum(rows, e), quartic=e.outer[0])

    def about(self, shift: Tensor) -> Self:
        """The squared norm of x + a is e + 2 a.x + |a|^2; the sums below are this expression, expanded."""
        a, gram = self.shift - shift, self.gram.about(shift)
        aa, e, along, projected = a.square().sum(), self.outer.trace(), a @ self.total, self.outer @ a
        skew = self.skew + 2 * projected + aa * self.total + a * (e + 2 * along + self.n * aa)
        quartic = self.quartic + 4 * a @ self.skew + 4 * a @ projected + 2 * aa * e + 4 * aa * along + self.n * aa.square()
        return type(self)(**gram.tensors(), skew=skew, quartic=quartic)

    @derived
    def centred(self) -> Self:
        """The same sums about the mean."""
        return self.about(shift=self.mean)

    @property
    def gram(self) -> Gram:
        return Gram(self.n, self.shift, self.total, self.outer, self.rounding)

    @property
    def norm_mean(self) -> Tensor:
        """Mean of |x - mean|^2, (1,); NaN without rows."""
        return (self.outer.trace() - self.total.square().sum() / self.n) / self.n

    @property
    def norm_square_sum(self) -> Tensor:
        """Sum of |x - mean|^4, (1,); NaN without rows."""
        return self.centred().quartic

    @property
    def norm_variance(self) -> Tensor:
        """Unbiased variance of |x - mean|^2, (1,); NaN below two rows."""
        return (self.norm_square_sum - self.n * self.norm_mean.square()) / free(self.n)


@dataclass(frozen=True, eq=False)
class Directions(Gram):
    """A Gram of the rows scaled to unit norm, about zero. Rows of norm zero are left out."""

    shifts: ClassVar = ()  # always about zero
    by_row: ClassVar = ("norms",)

    @classmethod
    def of(cls, x: Rows | Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        return cls(**Gram.of(directions(Rows.of(x, weights, shift))).tensors())

    def about(self, shift: Tensor | None = None) -> Self:
        """The statistic itself. Raises ValueError for a shift other than zero."""
        if shift is not None and bool(shift.any()):
            raise ValueError("Directions are always about zero and cannot be shifted: use the covariance")
        return self


def squared_norms(rows: Rows) -> Rows:
    """The squared norm of each row about the shift, as rows of width one, float64; 0 for masked rows."""
    return Rows(rows.squared_norms[:, None].double(), shifted=False)


def weighted_sum(rows: Rows, by: Rows) -> Tensor:
    """Sum of the rows about the shift, weighted by rows of width one, (width,) float64."""
    x = rows.x if rows.x.shape[1] > NARROW else rows.x.double()
    weights = by.x.to(x.dtype)
    with exact_products():
        if side_by_side(x):
            return (by_unit(x) @ weights.flatten()).double()
        return (x @ weights.transpose(1, 2)).sum((0, 2), dtype=torch.float64)


def directions(rows: Rows) -> Rows:
    """Each row, not shifted, scaled to unit norm; rows of norm zero are masked."""
    scale, keep = inverse_norms(rows)
    unit = rows.raw * scale[:, None]
    unit = unit if keep is None else unit.where(keep[:, None], 0)
    return Rows(unit, keep, torch.zeros_like(rows.shift), rows.grid, False)


def inverse_norms(rows: Rows) -> tuple[Tensor, Tensor | None]:
    """1 / norm of each row, not shifted, (samples, positions), and the mask of rows with a non-zero norm; None if all have."""
    square = Rows(rows.raw, rows.keep, shifted=False).squared_norms if rows.shifted else rows.squared_norms
    nonzero = (square > 0) & square.isfinite()
    keep = nonzero if rows.keep is None else nonzero & rows.keep
    scale = square.where(nonzero, 1).rsqrt()
    return scale, None if bool(keep.all()) else keep
