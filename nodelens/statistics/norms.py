"""What a Gram does not hold of its rows: how their lengths vary, and where they point."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from .gram import Gram
from .linalg import exact_products
from .moments import free
from .rows import NARROW, Rows


@dataclass(frozen=True, eq=False)
class NormedGram(Gram):
    """A Gram, and the sums that the squared length of its rows takes part in: e = |x - shift|^2, whose own sum is the trace."""

    skew: Tensor  # (d,)    float64  sum of e (x - shift)
    quartic: Tensor  # (1,)    float64  sum of e^2

    @classmethod
    def of(cls, x: Rows | Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        rows = Rows.of(x, weights, shift)
        e = norms(rows)
        return cls(rows.n, rows.shift, rows.total, rows.outer, weighed(rows, e), e.outer[0])

    def about(self, shift: Tensor) -> Self:
        """With x + a a row's squared length is e + 2 a.x + |a|^2: all below is this, multiplied out."""
        a, gram = self.shift - shift, self.gram.about(shift)
        aa, e, along, turned = a.square().sum(), self.outer.trace(), a @ self.total, self.outer @ a
        skew = self.skew + 2 * turned + aa * self.total + a * (e + 2 * along + self.n * aa)
        quartic = self.quartic + 4 * a @ self.skew + 4 * a @ turned + 2 * aa * e + 4 * aa * along + self.n * aa.square()
        return type(self)(**gram.tensors(), skew=skew, quartic=quartic)

    def centred(self) -> Self:
        """The same sums about the mean."""
        return self.about(shift=self.mean)

    @property
    def gram(self) -> Gram:
        return Gram(self.n, self.shift, self.total, self.outer)

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
    """A Gram of each row at length one, as it is, not about a shift. Rows of length zero are left out."""

    shifts: ClassVar = ()  # about zero always: there is nothing to agree on

    @classmethod
    def of(cls, x: Rows | Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        rows = directions(Rows.of(x, weights, shift))
        return cls(rows.n, rows.shift, rows.total, rows.outer)

    def about(self, shift: Tensor | None = None) -> Self:
        """Itself; Directions about another shift than zero are a Gram's."""
        if shift is not None and bool(shift.any()):
            raise ValueError("Directions are held about zero: take the covariance, which has no shift")
        return self


def norms(rows: Rows) -> Rows:
    """The squared length of each row about the shift, as rows of width one, float64; 0 where a row is not kept."""
    return Rows(rows.norms[:, None].double(), moved=False)


def weighed(rows: Rows, by: Rows) -> Tensor:
    """Sum of the rows about the shift, each times its number in rows of width one, (width,) float64."""
    x = rows.x if rows.x.shape[1] > NARROW else rows.x.double()
    _, width, positions = x.shape
    weights = by.x.to(x.dtype)
    with exact_products():
        if positions == 1 or x.stride(1) == 1:
            return (x.transpose(1, 2).reshape(-1, width).T @ weights.flatten()).double()
        return (x @ weights.transpose(1, 2)).sum((0, 2), dtype=torch.float64)


def directions(rows: Rows) -> Rows:
    """Each row, as it is, at length one; rows of length zero are not kept."""
    share, keep = shares(rows)
    unit = rows.raw * share[:, None]
    unit = unit if keep is None else unit.where(keep[:, None], 0)
    return Rows(unit, keep, torch.zeros_like(rows.shift), rows.grid, False)


def shares(rows: Rows) -> tuple[Tensor, Tensor | None]:
    """One over the length of each row as it is, (samples, positions), and which rows have one: None where all do."""
    square = rows.raw.square().sum(1) if rows.moved else rows.norms
    pointed = (square > 0) & square.isfinite()
    keep = pointed if rows.keep is None else pointed & rows.keep
    share = square.where(pointed, 1).rsqrt()
    return share, None if bool(keep.all()) else keep
