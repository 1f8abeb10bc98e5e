"""Products of the units of two sites, over the same rows."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from .base import Statistic, derived
from .moments import free
from .norms import squared_norms, weighted_sum
from .rows import Rows


@dataclass(frozen=True, eq=False)
class Pair(Statistic):
    """Second moments of the rows of one site (width d) with those of another (width t), each about its shift."""

    shifts: ClassVar = ("shift", "target_shift")
    n: Tensor  # (1,)    int64    rows that are valid at both sites
    shift: Tensor  # (d,)    float64
    target_shift: Tensor  # (t,)    float64
    total: Tensor  # (d,)    float64  sum of x - shift
    target_total: Tensor  # (t,)    float64  sum of y - target_shift
    cross: Tensor  # (d, t)  float64  sum of (x - shift)(y - target_shift)'

    @classmethod
    def of(cls, x: Rows | Tensor, target: Rows | Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        """From the rows of two sites, paired by sample and position; a row counts if it is kept and finite at both.

        Raises ValueError if the numbers of rows differ.
        """
        rows, other = paired_rows(x, target, weights, shift)
        return cls(rows.n, rows.shift, other.shift, rows.total, other.total, rows.products(other))

    def about(self, shift: Tensor, target_shift: Tensor) -> Self:
        a, b, n = self.shift - shift, self.target_shift - target_shift, self.n
        cross = self.cross + self.total.outer(b) + a.outer(self.target_total) + n * a.outer(b)
        return type(self)(n, shift, target_shift, self.total + n * a, self.target_total + n * b, cross)

    @derived
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
    @derived
    def covariance(self) -> Tensor:
        """Unbiased covariance between the units of the two sites, (d, t); NaN below two rows."""
        return (self.cross - self.total.outer(self.target_total) / self.n) / free(self.n)


@dataclass(frozen=True, eq=False)
class NormedPair(Pair):
    """A Pair, and sums with the squared norms of its rows, e = |x - shift|^2 and f = |y - target_shift|^2."""

    e: Tensor  # (1,)    float64  sum of e
    f: Tensor  # (1,)    float64  sum of f
    mixed: Tensor  # (1,)    float64  sum of e f
    left: Tensor  # (t,)    float64  sum of e (y - target_shift)
    right: Tensor  # (d,)    float64  sum of f (x - shift)

    @classmethod
    def of(cls, x: Rows | Tensor, target: Rows | Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        rows, other = paired_rows(x, target, weights, shift)
        e, f = squared_norms(rows), squared_norms(other)
        return cls(
            **Pair.of(rows, other).tensors(),
            e=e.total,
            f=f.total,
            mixed=e.products(f)[0],
            left=weighted_sum(other, e),
            right=weighted_sum(rows, f),
        )

    def about(self, shift: Tensor, target_shift: Tensor) -> Self:
        """The squared norms of x + a and y + b are e + 2 a.x + |a|^2 and f + 2 b.y + |b|^2; the sums below expand these."""
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
    """Sum of the cosines between the rows of two sites of equal width. Rows of norm zero at either site are left out."""

    n: Tensor  # (1,)  int64    rows
    total: Tensor  # (1,)  float64  sum of x.y / (|x| |y|)

    @classmethod
    def of(cls, x: Rows | Tensor, target: Rows | Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        """From the rows of two sites, not shifted; n = 0 if the widths differ.

        Raises ValueError if the numbers of rows differ.
        """
        rows, other = paired_rows(x, target, weights, shift)
        if rows.raw.shape[1] != other.raw.shape[1]:
            return cls(rows.n.new_zeros(1), rows.shift.new_zeros(1))
        (scale, keep), (other_scale, other_keep) = rows.inverse_norms, other.inverse_norms
        cosines = ((rows.raw * other.raw).sum(1) * scale * other_scale).double()
        if keep is None and other_keep is None:
            return cls(rows.n, cosines.sum().reshape(1))
        both = torch.ones_like(cosines, dtype=torch.bool)
        for mask in (keep, other_keep):
            both = both if mask is None else both & mask
        return cls(both.sum().reshape(1), cosines.where(both, 0).sum().reshape(1))

    @property
    def mean(self) -> Tensor:
        """Mean cosine, (1,); NaN without rows."""
        return self.total / self.n


def paired_rows(x: Rows | Tensor, target: Rows | Tensor, weights: Tensor | None, shift: Tensor | None) -> tuple[Rows, Rows]:
    """The rows of two sites that are kept and finite at both. Raises ValueError if the numbers of rows differ."""
    rows = Rows.of(x, weights, shift).finite()
    if isinstance(target, Tensor):
        target = Rows.of(target[:, None] if target.ndim == 1 else target, weights if isinstance(x, Tensor) else rows.keep)
    other = target.finite()
    (samples, _, positions), (other_samples, _, other_positions) = rows.raw.shape, other.raw.shape
    if (samples, positions) != (other_samples, other_positions):
        raise ValueError(
            f"{samples} samples of {positions} rows each cannot be paired with {other_samples} samples of {other_positions}: "
            "the two sites need the same rows (view=samples gives one row per sample)"
        )
    if rows.keep is other.keep:
        return rows, other
    keep = rows.mask() & other.mask()
    return rows.kept(keep), other.kept(keep)
