"""Statistics of row norms and row directions, which a Gram does not contain."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .base import derived
from .gram import Gram
from .linalg import by_unit, exact_products, side_by_side
from .rows import NARROW, Rows


@dataclass(frozen=True, eq=False)
class NormedGram(Gram):
    """A Gram, and sums with the squared norm of each row, e = |x - shift|^2; the sum of e is the trace of ``outer``."""

    by_row: ClassVar = ("norms", "skews")
    skew: Tensor  # (d,)    float64  sum of e (x - shift)
    quartic: Tensor  # (1,)    float64  sum of e^2

    @classmethod
    def of(cls, x: Rows | Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        rows = Rows.of(x, weights, shift)
        skew, quartic = _norm_sums(rows)
        return cls(**Gram.of(rows).tensors(), skew=skew, quartic=quartic)

    def _add(self, rows: Rows) -> None:
        super()._add(rows)
        skew, quartic = _norm_sums(rows)
        self.skew.add_(skew)
        self.quartic.add_(quartic)

    def about(self, shift: Tensor) -> Self:
        """The squared norm of x + a is e + 2 a.x + |a|^2; the sums below are this expression, expanded."""
        a, gram = self.shift - shift, self.gram.about(shift)
        aa, e, along, projected = a.square().sum(), self.squares.sum(), a @ self.total, self.outer @ a
        skew = self.skew + 2 * projected + aa * self.total + a * (e + 2 * along + self.n * aa)
        quartic = self.quartic + 4 * a @ self.skew + 4 * a @ projected + 2 * aa * e + 4 * aa * along + self.n * aa.square()
        return type(self)(**gram.tensors(), skew=skew, quartic=quartic)

    @derived
    def centred(self) -> Self:
        """The same sums about the mean."""
        return self.about(shift=self.mean)

    @property
    def gram(self) -> Gram:
        return Gram(self.n, self.shift, self.total, self.upper, self.rounding)


@dataclass(frozen=True, eq=False)
class Directions(Gram):
    """A Gram of the rows scaled to unit norm, about zero. Rows of norm zero are left out."""

    shifts: ClassVar = ()  # always about zero
    by_row: ClassVar = ("norms", "directions")

    @classmethod
    def of(cls, x: Rows | Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        return cls(**Gram.of(Rows.of(x, weights, shift).directions).tensors())

    def add_rows_in_place(self, rows: Any, *target: Tensor) -> bool:
        self._add(rows.directions)
        return True

    def about(self, shift: Tensor | None = None) -> Self:
        """The statistic itself. Raises ValueError for a shift other than zero."""
        if shift is not None and bool(shift.any()):
            raise ValueError("Directions are always about zero and cannot be shifted: use the covariance")
        return self


def _norm_sums(rows: Rows) -> tuple[Tensor, Tensor]:
    """The sum of the rows about the shift times their squared norms, (width,), and that of the squared norms squared, (1,)."""
    quartic = rows.squared_norms.double().square().sum().reshape(1)
    if "skews" in rows.ready and rows.raw.shape[1] > NARROW:
        return rows.ready["skews"].sum(0, dtype=torch.float64), quartic
    return weighted_sum(rows, squared_norms(rows)), quartic


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
