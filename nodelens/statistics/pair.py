"""Products of two sites' units: the same rows, seen at both."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from .base import Statistic
from .moments import free
from .norms import norms, shares, weighed
from .rows import Rows


@dataclass(frozen=True, eq=False)
class Pair(Statistic):
    """Second moments of a site's rows (width d) with another's (width t), each about its shift."""

    shifts: ClassVar = ("shift", "target_shift")
    n: Tensor  # (1,)    int64    rows that count at both
    shift: Tensor  # (d,)    float64
    target_shift: Tensor  # (t,)    float64
    total: Tensor  # (d,)    float64  sum of x - shift
    target_total: Tensor  # (t,)    float64  sum of y - target_shift
    cross: Tensor  # (d, t)  float64  sum of (x - shift)(y - target_shift)'

    @classmethod
    def of(cls, x: Rows | Tensor, target: Rows | Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        """Rows of two sites, sample by sample and position by position; one counts where it is kept and finite at both.

        Raises ValueError where their numbers differ.
        """
        rows, beside = joined(x, target, weights, shift)
        return cls(rows.n, rows.shift, beside.shift, rows.total, beside.total, rows.products(beside))

    def about(self, shift: Tensor, target_shift: Tensor) -> Self:
        a, b, n = self.shift - shift, self.target_shift - target_shift, self.n
        cross = self.cross + self.total.outer(b) + a.outer(self.target_total) + n * a.outer(b)
        return type(self)(n, shift, target_shift, self.total + n * a, self.target_total + n * b, cross)

    def centred(self) -> Self:
        """The same sums about both means."""
        return self.about(shift=self.mean, target_shift=self.target_mean)

    @property
    def mean(self) -> Tensor:
        """(d,), in the unit of x; NaN without rows."""
        return self.shift + self.total / self.n

    @property
    def target_mean(self) -> Tensor:
        """(t,), in the unit of y; NaN without rows."""
        return self.target_shift + self.target_total / self.n

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance of the two sites' units, (d, t); NaN below two rows."""
        return (self.cross - self.total.outer(self.target_total) / self.n) / free(self.n)


@dataclass(frozen=True, eq=False)
class NormedPair(Pair):
    """A Pair, and the sums that the squared lengths of its rows take part in: e = |x - shift|^2, f = |y - target_shift|^2."""

    e: Tensor  # (1,)    float64  sum of e
    f: Tensor  # (1,)    float64  sum of f
    mixed: Tensor  # (1,)    float64  sum of e f
    left: Tensor  # (t,)    float64  sum of e (y - target_shift)
    right: Tensor  # (d,)    float64  sum of f (x - shift)

    @classmethod
    def of(cls, x: Rows | Tensor, target: Rows | Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        rows, beside = joined(x, target, weights, shift)
        e, f = norms(rows), norms(beside)
        return cls(
            **Pair.of(rows, beside).tensors(),
            e=e.total,
            f=f.total,
            mixed=e.products(f)[0],
            left=weighed(beside, e),
            right=weighed(rows, f),
        )

    def about(self, shift: Tensor, target_shift: Tensor) -> Self:
        """With x + a and y + b a row's lengths are e + 2 a.x + |a|^2 and f + 2 b.y + |b|^2: all below is these, multiplied out."""
        a, b, n = self.shift - shift, self.target_shift - target_shift, self.n
        aa, bb = a.square().sum(), b.square().sum()
        e, f = self.e + 2 * a @ self.total, self.f + 2 * b @ self.target_total
        across = 2 * a @ self.right + 2 * b @ self.left + 4 * a @ self.cross @ b
        return type(self)(
            **Pair(n, self.shift, self.target_shift, self.total, self.target_total, self.cross)
            .about(shift, target_shift)
            .tensors(),
            e=e + n * aa,
            f=f + n * bb,
            mixed=self.mixed + across + bb * e + aa * f + n * aa * bb,
            left=self.left + 2 * a @ self.cross + aa * self.target_total + b * (e + n * aa),
            right=self.right + 2 * self.cross @ b + bb * self.total + a * (f + n * bb),
        )


@dataclass(frozen=True, eq=False)
class Cosines(Statistic):
    """Sum of the cosines between the rows of two sites of one width. Rows of length zero at either are left out."""

    n: Tensor  # (1,)  int64    rows
    total: Tensor  # (1,)  float64  sum of x.y / (|x| |y|)

    @classmethod
    def of(cls, x: Rows | Tensor, target: Rows | Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        """Rows of two sites, as they are, not about a shift: none counts where the widths differ.

        Raises ValueError where their numbers differ.
        """
        rows, beside = joined(x, target, weights, shift)
        if rows.raw.shape[1] != beside.raw.shape[1]:
            return cls(rows.n.new_zeros(1), rows.shift.new_zeros(1))
        (share, keep), (other, known) = shares(rows), shares(beside)
        cosines = ((rows.raw * beside.raw).sum(1) * share * other).double()
        if keep is None and known is None:
            return cls(rows.n, cosines.sum().reshape(1))
        both = torch.ones_like(cosines, dtype=torch.bool)
        for mask in (keep, known):
            both = both if mask is None else both & mask
        return cls(both.sum().reshape(1), cosines.where(both, 0).sum().reshape(1))

    @property
    def mean(self) -> Tensor:
        """Mean cosine, (1,); NaN without rows."""
        return self.total / self.n


def joined(x: Rows | Tensor, target: Rows | Tensor, weights: Tensor | None, shift: Tensor | None) -> tuple[Rows, Rows]:
    """Rows of two sites, kept where both are kept and finite. Raises ValueError where their numbers differ."""
    rows = Rows.of(x, weights, shift).finite()
    if isinstance(target, Tensor):
        target = Rows.of(target[:, None] if target.ndim == 1 else target, weights if isinstance(x, Tensor) else rows.keep)
    beside = target.finite()
    (samples, _, positions), (others, _, places) = rows.raw.shape, beside.raw.shape
    if (samples, positions) != (others, places):
        raise ValueError(
            f"{samples} samples of {positions} rows each meet {others} samples of {places}: "
            "two sites want the same rows (view samples: a row a sample)"
        )
    if rows.keep is beside.keep:
        return rows, beside
    keep = rows.mask() & beside.mask()
    return rows.kept(keep), beside.kept(keep)
