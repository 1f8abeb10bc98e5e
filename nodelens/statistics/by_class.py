"""Sums per class: moments, absolute values, and second moments of pairs within each class."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from . import triangle
from .base import Statistic
from .gram import Gram
from .linalg import exact_products, resolution
from .moments import Moments
from .rows import Rows
from .sample_sums import SampleSums


@dataclass(frozen=True, eq=False)
class ClassStatistic(Statistic):
    """Sums per class: the first dimension of every field but the shifts is the class.

    Parts that saw different numbers of classes can be added.
    """

    n: Tensor  # (K,)  int64  rows of the class

    def __add__(self, other: Self) -> Self:
        classes = max(len(self.n), len(other.n))
        return Statistic.__add__(self.widen(classes), other.widen(classes))

    @classmethod
    def aligned(cls, parts: Sequence[Self]) -> list[Self]:
        """The same parts about the shifts of the first one, of one number of classes."""
        classes = max(part.n.shape[0] for part in parts)
        return super().aligned([part.widen(classes) for part in parts])

    @classmethod
    def added(cls, parts: Sequence[Self]) -> Self:
        classes = max(part.n.shape[0] for part in parts)
        return super().added([part.widen(classes) for part in parts])

    def widen(self, classes: int) -> Self:
        """The same sums, padded with zeros to a larger number of classes."""
        more = classes - self.n.shape[0]
        if not more:
            return self
        return type(self)(**{k: t if k in self.shifts else _padded(t, more) for k, t in self.tensors().items()})

    def only(self, classes: Tensor) -> Self:
        """The sums of the selected classes only, (K,) bool."""
        return type(self)(**{k: t if k in self.shifts else t[classes] for k, t in self.tensors().items()})

    def free(self, ddof: int) -> Tensor:
        """Degrees of freedom of each class, n - ddof, (K,) float64; NaN for a class of ddof rows or fewer."""
        return torch.where(self.n > ddof, self.n.double() - ddof, torch.nan)


@dataclass(frozen=True, eq=False)
class ByClass(ClassStatistic):
    """Count, sum and sum of squares of each unit in each class, about one shift."""

    shifts: ClassVar = ("shift",)
    by_sample: ClassVar = "squares"
    shift: Tensor  # (d,)    float64
    total: Tensor  # (K, d)  float64  sum of x - shift
    square: Tensor  # (K, d)  float64  sum of (x - shift)^2

    @classmethod
    def of(cls, x: Rows | SampleSums | Tensor, target: Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        """From rows or their per-sample sums; target (samples,) holds class numbers from 0, below 0 for no class."""
        rows = _sample_sums(x, "squares", weights, shift)
        member = _one_hot(rows, target)
        squares = rows.tables()["squares"]
        return cls(_class_counts(member, rows), rows.shift, member.T @ rows.sums.double(), member.T @ squares.double())

    def add_rows_in_place(self, rows: Any, *target: Tensor) -> bool:
        if not isinstance(rows, SampleSums) or rows.shift is not self.shift:
            return False
        values = rows.counts[:, 0], rows.sums, rows.tables()["squares"]
        return _index_add(target[0], rows, list(zip((self.n, self.total, self.square), values, strict=True)))

    def about(self, shift: Tensor) -> Self:
        step, n = self.shift - shift, self.n[:, None]
        square = self.square + 2 * step * self.total + n * step.square()
        return type(self)(self.n, shift, self.total + n * step, square)

    @property
    def mean(self) -> Tensor:
        """(K, d), in the unit of x; NaN for a class without rows."""
        return self.shift + self.total / self.n[:, None]

    @property
    def mean_square(self) -> Tensor:
        """Mean of x^2 in each class, (K, d); NaN for a class without rows."""
        return self.about(shift=torch.zeros_like(self.shift)).square / self.n[:, None]

    def variance(self, ddof: int = 1) -> Tensor:
        """Variance within each class, (K, d); NaN for a class of ddof rows or fewer."""
        return _centred_squares(self.square, self.total, self.n) / self.free(ddof)[:, None]

    @property
    def moments(self) -> Moments:
        """Moments of all rows that have a class."""
        return Moments(self.n.sum().reshape(1), self.shift, self.total.sum(0), self.square.sum(0))


@dataclass(frozen=True, eq=False)
class ClassSizes(ClassStatistic):
    """Sum of |x| of each unit in each class."""

    by_sample: ClassVar = "absolutes"
    absolute: Tensor  # (K, d)  float64  sum of |x|

    @classmethod
    def of(cls, x: Rows | SampleSums | Tensor, target: Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        """From rows or their per-sample sums; target (samples,) holds class numbers from 0, below 0 for no class."""
        rows = _sample_sums(x, "absolutes", weights, shift)
        member = _one_hot(rows, target)
        return cls(_class_counts(member, rows), member.T @ rows.tables()["absolutes"].double())

    def add_rows_in_place(self, rows: Any, *target: Tensor) -> bool:
        if not isinstance(rows, SampleSums):
            return False
        return _index_add(target[0], rows, [(self.n, rows.counts[:, 0]), (self.absolute, rows.tables()["absolutes"])])

    @property
    def mean(self) -> Tensor:
        """Mean of |x| in each class, (K, d); NaN for a class without rows."""
        return self.absolute / self.n[:, None]


@dataclass(frozen=True, eq=False)
class ClassGram(ClassStatistic):
    """Sum and outer-product sum of the rows of each class, about one shift."""

    shifts: ClassVar = ("shift",)
    shift: Tensor  # (d,)       float64
    total: Tensor  # (K, d)     float64  sum of x - shift
    outer: Tensor  # (K, d, d)  float64  sum of (x - shift)(x - shift)'

    @classmethod
    def of(cls, x: Rows | Tensor, target: Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        """From rows; each position has the class of its sample. target (samples,): class numbers from 0, below 0 for no class."""
        rows = Rows.of(x, weights, shift)
        member = _one_hot(rows, target)
        width = rows.raw.shape[1]
        outer = torch.zeros(member.shape[1], width, width, dtype=torch.float64, device=rows.raw.device)
        for c in member.any(0).nonzero().flatten().tolist():
            outer[c] = rows.index(member[:, c].bool()).outer
        return cls(_class_counts(member, rows), rows.shift, member.T @ rows.sample_sums.double(), outer)

    def about(self, shift: Tensor) -> Self:
        step, n = self.shift - shift, self.n[:, None]
        mixed = self.total[:, :, None] * step
        outer = self.outer + mixed + mixed.mT + n[:, None] * step.outer(step)
        return type(self)(self.n, shift, self.total + n * step, outer)

    @property
    def mean(self) -> Tensor:
        """(K, d), in the unit of x; NaN for a class without rows."""
        return self.shift + self.total / self.n[:, None]

    def covariance(self, ddof: int = 1) -> Tensor:
        """Covariance within each class, (K, d, d); NaN for a class of ddof rows or fewer."""
        return _centred_products(self.outer, self.total, self.total, self.n) / self.free(ddof)[:, None, None]

    @property
    def by_class(self) -> ByClass:
        """Moments of the same rows in each class."""
        return ByClass(self.n, self.shift, self.total, self.outer.diagonal(dim1=1, dim2=2))

    @property
    def gram(self) -> Gram:
        """Moments of all rows that have a class."""
        outer = self.outer.sum(0)
        rounding = resolution(torch.float64, len(outer)) * outer.diagonal()  # rows of samples are float64
        return Gram(self.n.sum().reshape(1), self.shift, self.total.sum(0), triangle.pack(outer), rounding)


@dataclass(frozen=True, eq=False)
class ClassCross(ClassStatistic):
    """Second moments, within each class, of rows (width d) with targets (width t), one target row per row."""

    shifts: ClassVar = ("shift", "target_shift")
    shift: Tensor  # (d,)       float64
    target_shift: Tensor  # (t,)       float64
    total: Tensor  # (K, d)     float64  sum of x - shift
    square: Tensor  # (K, d)     float64  sum of (x - shift)^2
    target_total: Tensor  # (K, t)     float64  sum of z - target_shift
    target_square: Tensor  # (K, t)     float64
    cross: Tensor  # (K, d, t)  float64  sum of (x - shift)(z - target_shift)'

    @classmethod
    def of(cls, x: Rows | Tensor, target: Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        """Rows (n, d), one per sample; target (n, 1 + t), whose first column is the class, NaN or below 0 for no class.

        Raises ValueError if the numbers of rows and targets differ.
        """
        rows = Rows.of(x, weights, shift)
        if rows.raw.shape[2] != 1 or target.ndim != 2 or target.shape[1] < 2 or len(target) != len(rows):
            raise ValueError(
                f"{len(rows)} samples of {rows.raw.shape[2]} rows each, but targets {tuple(target.shape)}: "
                "give one row (class, target, ...) per row"
            )
        label, z = target[:, 0].nan_to_num(-1).long(), target[:, 1:].double()
        keep = z.isfinite().all(1) & rows.mask()[:, 0]
        rows = rows.kept(keep[:, None])
        member = _one_hot(rows, label)
        z_shift = z.where(keep[:, None], 0).sum(0) / keep.sum().clamp_min(1)
        z = (z - z_shift).where(keep[:, None], 0)
        values = rows.x[:, :, 0].double()
        marked = (member[:, :, None] * z[:, None]).flatten(1)  # (n, K t)
        with exact_products():
            cross = (marked.T @ values).unflatten(0, (member.shape[1], z.shape[1])).mT
        return cls(
            _class_counts(member, rows),
            rows.shift,
            z_shift,
            member.T @ values,
            member.T @ values.square(),
            member.T @ z,
            member.T @ z.square(),
            cross.contiguous(),
        )

    def about(self, shift: Tensor, target_shift: Tensor) -> Self:
        a, b, n = self.shift - shift, self.target_shift - target_shift, self.n[:, None]
        mixed = self.total[:, :, None] * b + a[:, None] * self.target_total[:, None]
        return type(self)(
            self.n,
            shift,
            target_shift,
            self.total + n * a,
            self.square + 2 * a * self.total + n * a.square(),
            self.target_total + n * b,
            self.target_square + 2 * b * self.target_total + n * b.square(),
            self.cross + mixed + n[:, None] * a.outer(b),
        )

    def covariance(self, ddof: int = 1) -> Tensor:
        """Covariance of units and targets within each class, (K, d, t); NaN for a class of ddof rows or fewer."""
        return _centred_products(self.cross, self.total, self.target_total, self.n) / self.free(ddof)[:, None, None]

    def variance(self, ddof: int = 1) -> Tensor:
        """Variance of each unit within each class, (K, d); NaN for a class of ddof rows or fewer."""
        return _centred_squares(self.square, self.total, self.n) / self.free(ddof)[:, None]

    def target_variance(self, ddof: int = 1) -> Tensor:
        """Variance of each target within each class, (K, t); NaN for a class of ddof rows or fewer."""
        return _centred_squares(self.target_square, self.target_total, self.n) / self.free(ddof)[:, None]

    @property
    def by_class(self) -> ByClass:
        """Moments of the same rows in each class."""
        return ByClass(self.n, self.shift, self.total, self.square)


def _sample_sums(x: Rows | SampleSums | Tensor, table: str, weights: Tensor | None, shift: Tensor | None) -> SampleSums:
    """Per-sample sums. With one row per sample they are float64: this is cheap, and a variance is a difference of sums."""
    if isinstance(x, SampleSums):
        return x
    rows = Rows.of(x, weights, shift)
    return (rows.double() if rows.raw.shape[2] == 1 else rows).by_sample(table)


def _one_hot(rows: Rows | SampleSums, target: Tensor) -> Tensor:
    """One-hot class membership, (samples, K) float64. Raises ValueError if labels are not one integer per sample."""
    if target.shape != (len(rows),) or target.is_floating_point():
        raise ValueError(
            f"{len(rows)} samples, but labels {tuple(target.shape)} of {target.dtype}: give one integer class per sample"
        )
    keep = (target >= 0) & (rows.counts[:, 0] > 0)
    classes = int(target.max()) + 1 if len(target) else 0
    return torch.nn.functional.one_hot(target.clamp_min(0).long(), max(classes, 1)).where(keep[:, None], 0).double()


def _index_add(target: Tensor, rows: SampleSums, tables: list[tuple[Tensor, Tensor]]) -> bool:
    """Adds each sample to its class, for pairs of sums (K, ...) and values (samples, ...), in place; returns whether it did.

    It is not done for a class that the sums do not have, or on a GPU, where index_add_ would add in a random order.
    """
    if rows.counts.device.type != "cpu" or (len(target) and int(target.max()) >= len(tables[0][0])):
        return False
    keep = (target >= 0) & (rows.counts[:, 0] > 0)
    every = bool(keep.all())
    for sums, values in tables:
        sums.index_add_(0, target if every else target[keep], (values if every else values[keep]).to(sums.dtype))
    return True


def _class_counts(member: Tensor, rows: Rows | SampleSums) -> Tensor:
    return (member.T @ rows.counts.double())[:, 0].round().long()


def _padded(table: Tensor, more: int) -> Tensor:
    return torch.cat([table, table.new_zeros(more, *table.shape[1:])])


def _centred_squares(square: Tensor, total: Tensor, n: Tensor) -> Tensor:
    """Sum of squares about the class means, (K, d); NaN for a class without rows."""
    return (square - total.square() / n[:, None]).clamp_min(0)


def _centred_products(cross: Tensor, left: Tensor, right: Tensor, n: Tensor) -> Tensor:
    """Sum of products about the class means, (K, d, t); NaN for a class without rows."""
    return cross - left[:, :, None] * right[:, None] / n[:, None, None]
