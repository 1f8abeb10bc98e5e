"""Second moments of all pairs: of the units of one site, and of the units with paired targets."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from . import triangle
from .base import Statistic, derived
from .linalg import exact_products, maps_by_sample, resolution
from .moments import Moments, free
from .rows import Rows
from .sample_sums import SampleSums

TERMS = 8192  # rows summed by one float32 product: keeps rounding below what standard errors resolve


@dataclass(frozen=True, eq=False)
class Gram(Statistic):
    """Count, sum and outer-product sum of rows of width d, about a shift, and the rounding error of these products."""

    shifts: ClassVar[tuple[str, ...]] = ("shift",)
    n: Tensor  # (1,)    int64    rows
    shift: Tensor  # (d,)    float64  a guess of the mean
    total: Tensor  # (d,)    float64  sum of x - shift
    upper: Tensor  # (triangle.size(d),) float64  the upper triangle of ``outer``
    rounding: Tensor  # (d,)    float64  error of the diagonal of outer; that of entry (i, j) is at most sqrt(r_i r_j)

    @classmethod
    def of(cls, x: Rows | Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        rows = Rows.of(x, weights, shift)
        width, total = rows.raw.shape[1], rows.total
        if rows.compiles_products:
            rows.add_products(upper := torch.zeros(triangle.size(width), dtype=torch.float64))
        else:
            upper = triangle.pack(rows.outer)
        return cls(rows.n, rows.shift, total, upper, rounding_error(rows, total, triangle.diagonal(upper, width)))

    def add_rows_in_place(self, rows: Any, *target: Tensor) -> bool:
        if rows.shift is not self.shift:
            return False
        self._add(rows)
        return True

    def _add(self, rows: Rows) -> None:
        total, (samples, _, positions) = rows.total, rows.raw.shape
        self.n.add_(samples * positions if rows.keep is None else rows.n)
        self.total.add_(total)
        if rows.compiles_products:
            before = self.squares
            rows.add_products(self.upper)
            squares = self.squares - before
        else:
            outer = rows.outer
            triangle.add(self.upper, outer)
            squares = outer.diagonal()
        self.rounding.add_(rounding_error(rows, total, squares))

    def about(self, shift: Tensor) -> Self:
        step, n = self.shift - shift, self.n
        half = self.total + n * step / 2
        outer = self.outer.addr_(half, step).addr_(step, half)
        return type(self)(n, shift, self.total + n * step, triangle.pack(outer), self.rounding)

    @property
    def outer(self) -> Tensor:
        """Sum of (x - shift)(x - shift)', (d, d), in newly allocated memory."""
        return triangle.unpack(self.upper, len(self.total))

    @property
    def squares(self) -> Tensor:
        """Sum of (x - shift)^2, (d,): the diagonal of ``outer``."""
        return triangle.diagonal(self.upper, len(self.total))

    @property
    def mean(self) -> Tensor:
        """(d,), in the unit of x; NaN without rows."""
        return self.shift + self.total / self.n

    @property
    @derived
    def covariance(self) -> Tensor:
        """Unbiased covariance, (d, d), in the unit of x squared; NaN below two rows."""
        return self.outer.sub_(self.total.outer(self.total).div_(self.n)).div_(free(self.n))

    @property
    def variance_rounding(self) -> Tensor:
        """Rounding error of the variances, (d,), in the unit of x squared; NaN below two rows."""
        return self.rounding / free(self.n)

    @property
    @derived
    def moments(self) -> Moments:
        """Moments of the same rows, from the diagonal."""
        return Moments(self.n, self.shift, self.total, self.squares)


class MapGrams:
    """Sums of products of the units of feature maps, per group of samples. Samples are read where they lie, in any order.

    A sum is kept in the dtype of the products until it holds ``TERMS`` rows.
    """

    def __init__(self) -> None:
        self.held: dict[int, Tensor] = {}  # by group, in the dtype of the products
        self.rows: dict[int, int] = {}  # of which ``held`` is the sum
        self.full: dict[int, Tensor] = {}  # float64, as ``triangle`` holds it

    @staticmethod
    def fits(rows: Rows) -> bool:
        """Whether a product per sample is faster than one of many samples, which takes a copy sorted by group."""
        return rows.raw.device.type == "cpu" and maps_by_sample(rows.raw, rows.raw)

    def add(self, rows: Rows, group: list[int]) -> None:
        """Adds samples, given the group of each."""
        _, width, positions = rows.raw.shape
        if rows.compiles_products:
            for g in sorted({*group}):
                if g not in self.full:
                    self.full[g] = torch.zeros(triangle.size(width), dtype=torch.float64)
                rows.add_products(self.full[g], [k for k, each in enumerate(group) if each == g])
            return
        dtype = rows.product_dtype(rows)
        with exact_products():
            for g, sample in zip(group, rows.x.to(dtype).unbind(0), strict=True):
                if g not in self.held:
                    self.held[g], self.rows[g] = sample.new_zeros(width, width), 0
                self.held[g].addmm_(sample, sample.T)
                self.rows[g] += positions
                if self.rows[g] >= TERMS and dtype != torch.float64:
                    self.full[g] = self._upper(g)
                    self.held[g].zero_()
                    self.rows[g] = 0

    def _upper(self, group: int) -> Tensor:
        if group not in self.held:
            return self.full[group]
        held = triangle.pack(self.held[group].double())
        return held if group not in self.full else self.full[group].add_(held)

    def read(self, sums: SampleSums, group: Tensor, like: Rows) -> dict[int, Gram]:
        """The second moments of each group, given the sums and the group (samples,) of every sample that was added."""
        present = sorted({*self.held, *self.full})
        groups = 1 + max(present, default=-1)
        n = sums.counts.new_zeros(groups, 1).index_add_(0, group, sums.counts)
        total = torch.zeros(groups, sums.sums.shape[1], dtype=torch.float64).index_add_(0, group, sums.sums.double())
        found = {}
        for g in present:
            upper = self._upper(g)
            rounding = _rounding_error(like, n[g], total[g], triangle.diagonal(upper, total.shape[1]))
            found[g] = Gram(n[g], like.shift, total[g], upper, rounding)
        return found


def rounding_error(rows: Rows, total: Tensor, square: Tensor) -> Tensor:
    """Error of sums of squares about the shift, (d,): that of the products, and that of rows which are float32 themselves."""
    return _rounding_error(rows, rows.n, total, square)


def _rounding_error(rows: Rows, n: Tensor, total: Tensor, square: Tensor) -> Tensor:
    """The same for n rows, (..., 1) with sums (..., d)."""
    share = resolution(rows.product_dtype(rows), square.shape[-1])
    if rows.raw.dtype == torch.float64:
        return share * square
    of_rows = torch.finfo(rows.raw.dtype).eps ** 2
    if not rows.shifted:
        return (share + of_rows) * square
    return share * square + of_rows * (square + 2 * rows.shift * total + n * rows.shift.square())


@dataclass(frozen=True, eq=False)
class Cross(Statistic):
    """Second moments of rows (width d) with targets (width t), one target row per row."""

    shifts: ClassVar = ("shift", "target_shift")
    n: Tensor  # (1,)    int64
    shift: Tensor  # (d,)    float64
    target_shift: Tensor  # (t,)    float64
    total: Tensor  # (d,)    float64  sum of x - shift
    target_total: Tensor  # (t,)    float64  sum of z - target_shift
    target_outer: Tensor  # (t, t)  float64
    cross: Tensor  # (d, t)  float64  sum of (x - shift)(z - target_shift)'

    @classmethod
    def of(cls, x: Rows | Tensor, target: Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        """Rows (n, d), one per sample; target (n,) or (n, t). Raises ValueError if their numbers differ."""
        rows = Rows.of(x, weights, shift)
        z = (target[:, None] if target.ndim == 1 else target).double()
        if rows.raw.shape[2] != 1 or len(z) != len(rows):
            raise ValueError(f"{len(rows)} samples of {rows.raw.shape[2]} rows, but {len(z)} targets: give one target per row")
        keep = z.isfinite().all(1)
        keep = keep if rows.keep is None else keep & rows.keep[:, 0]
        if rows.keep is not None or keep.device.type != "cpu" or not bool(keep.all()):  # on a GPU it would synchronise
            rows = rows.kept(keep[:, None])
        z_shift = z.where(keep[:, None], 0).sum(0) / keep.sum().clamp_min(1)
        z = (z - z_shift).where(keep[:, None], 0)
        both = torch.cat([z, keep[:, None].double()], 1).to(rows.x.dtype)  # one product for the cross and the plain sums
        with exact_products():
            sums = (rows.x[:, :, 0].T @ both).double()
            outer = z.T @ z
        return cls(rows.n, rows.shift, z_shift, sums[:, -1], z.sum(0), outer, sums[:, :-1].contiguous())

    def about(self, shift: Tensor, target_shift: Tensor) -> Self:
        a, b, n = self.shift - shift, self.target_shift - target_shift, self.n
        cross = self.cross + self.total.outer(b) + a.outer(self.target_total) + n * a.outer(b)
        mixed = self.target_total.outer(b)
        outer = self.target_outer + mixed + mixed.T + n * b.outer(b)
        return type(self)(n, shift, target_shift, self.total + n * a, self.target_total + n * b, outer, cross)

    @property
    @derived
    def covariance(self) -> Tensor:
        """Unbiased covariance of units and targets, (d, t); NaN below two rows."""
        return (self.cross - self.total.outer(self.target_total) / self.n) / free(self.n)

    @property
    @derived
    def target_covariance(self) -> Tensor:
        """Unbiased covariance of the targets, (t, t); NaN below two rows."""
        return (self.target_outer - self.target_total.outer(self.target_total) / self.n) / free(self.n)

    @property
    def target_mean(self) -> Tensor:
        """(t,); NaN without rows."""
        return self.target_shift + self.target_total / self.n

    def project(self, axes: Tensor) -> "Cross":
        """The same sums for targets z @ axes, axes (t, s)."""
        outer = axes.T @ self.target_outer @ axes
        shift, total = self.target_shift @ axes, self.target_total @ axes
        return Cross(self.n, self.shift, shift, self.total, total, outer, self.cross @ axes)
