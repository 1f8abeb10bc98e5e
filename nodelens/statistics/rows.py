"""Rows: the tensors seen at a site, in one layout, with the reductions from which all statistics are computed."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .linalg import exact_products

FAR = 1.0  # means larger than this many standard deviations are subtracted before long float32 sums
NARROW = 32  # up to this many units a product is cheaper than reading its rows, so float64 is used


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one site about a shift; masked rows contribute to no sum.

    Shapes: raw (samples, width, positions) of any strides; keep (samples, positions) bool or None for all;
            shift (width,) float64; grid the spatial shape of the positions, () for one position per sample
    """

    raw: Tensor
    keep: Tensor | None = None
    shift: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    grid: tuple[int, ...] = ()
    shifted: bool = True  # False if the shift is known to be zero; testing the tensor would synchronise a GPU

    @classmethod
    def of(cls, x: "Rows | Tensor", weights: Tensor | None = None, shift: Tensor | None = None) -> "Rows":
        """From a tensor (n, width) or (samples, width, positions); weights (n,) bool. Without a shift: about the mean."""
        if isinstance(x, Rows):
            return x if shift is None else x.about(shift)
        if x.ndim == 2:
            x, weights = x[:, :, None], None if weights is None else weights.reshape(-1, 1).bool()
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        rows = cls(x, weights, torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)).finite()
        return rows.about(rows.mean if shift is None else shift)

    def __len__(self) -> int:
        return len(self.raw)

    def about(self, shift: Tensor, shifted: bool = True) -> "Rows":
        """The same rows about another shift; ``shifted`` is False for a shift of zero."""
        return Rows(self.raw, self.keep, shift, self.grid, shifted)

    def take(self, first: int, last: int) -> "Rows":
        """The rows of samples first..last-1, as views."""
        keep = None if self.keep is None else self.keep[first:last]
        part = Rows(self.raw[first:last], keep, self.shift, self.grid, self.shifted)
        for name in ("x", "sample_sums"):  # slice cached values instead of recomputing them
            if name in self.__dict__:
                part.__dict__[name] = self.__dict__[name][first:last]
        return part

    def index(self, samples: Tensor) -> "Rows":
        """The rows of some samples, as copies."""
        samples = samples.to(self.raw.device)
        keep = None if self.keep is None else self.keep[samples]
        return Rows(self.raw[samples], keep, self.shift, self.grid, self.shifted)

    def at(self, places: Tensor) -> "Rows":
        """The rows at some positions of each sample, places (samples, count) int64, as copies."""
        places = places.to(self.raw.device)
        raw = self.raw[torch.arange(len(places), device=places.device)[:, None], :, places].transpose(1, 2)
        return Rows(raw, None if self.keep is None else self.keep.gather(1, places), self.shift, (), self.shifted)

    def copy(self) -> "Rows":
        """The same rows in newly allocated memory."""
        return Rows(self.raw.clone(), self.keep, self.shift, self.grid)

    def kept(self, keep: Tensor | None) -> "Rows":
        """The same rows with another mask, (samples, positions) bool."""
        return Rows(self.raw, keep, self.shift, self.grid, self.shifted)

    def double(self) -> "Rows":
        """The same rows in float64."""
        double = self.raw.dtype == torch.float64
        return self if double else Rows(self.raw.double(), self.keep, self.shift, self.grid, self.shifted)

    def mask(self) -> Tensor:
        """The mask of rows that count, (samples, positions) bool."""
        return torch.ones_like(self.raw[:, 0], dtype=torch.bool) if self.keep is None else self.keep

    def finite(self) -> "Rows":
        """The same rows with those masked that contain a NaN or an infinity."""
        if self.x.device.type == "cpu" and math.isfinite(float(self.sample_sums.sum())):
            return self  # a non-finite value makes the sum non-finite; on a GPU the check would synchronise
        finite = self.raw.isfinite().all(1)
        return Rows(self.raw, finite if self.keep is None else self.keep & finite, self.shift, self.grid, self.shifted)

    @cached_property
    def x(self) -> Tensor:
        """Values about the shift, (samples, width, positions); 0 for masked rows."""
        x = self.raw
        if self.shifted:
            x = x - self.shift.to(x.dtype)[:, None]
        return x if self.keep is None else x.where(self.keep[:, None], 0)

    @cached_property
    def n(self) -> Tensor:
        """Number of rows that count, (1,) int64."""
        samples, _, positions = self.raw.shape
        if self.keep is None:
            return torch.full((1,), samples * positions, device=self.raw.device)
        return self.keep.sum().reshape(1)

    @cached_property
    def counts(self) -> Tensor:
        """Number of rows that count in each sample, (samples, 1) int64."""
        samples, _, positions = self.raw.shape
        if self.keep is None:
            return torch.full((samples, 1), positions, device=self.raw.device)
        return self.keep.sum(1, keepdim=True)

    @cached_property
    def sample_sums(self) -> Tensor:
        """Sums about the shift over the positions of each sample, (samples, width)."""
        return self.x[:, :, 0] if self.x.shape[2] == 1 else self.x.sum(2)

    @cached_property
    def squared_norms(self) -> Tensor:
        """Squared norm of each row about the shift, (samples, positions); 0 for masked rows."""
        return self.x.square().sum(1)

    @property
    def total(self) -> Tensor:
        """Sum about the shift, (width,) float64."""
        return self.sample_sums.sum(0, dtype=torch.float64)

    @property
    def square(self) -> Tensor:
        """Sum of squares about the shift, (width,) float64."""
        norms = torch.linalg.vector_norm(self.x, dim=2)  # the only reduction of squares without a copy
        return norms.double().square().sum(0)

    @property
    def outer(self) -> Tensor:
        """Sum of products about the shift, (width, width) float64."""
        return self.products(self)

    def product_dtype(self, other: "Rows") -> torch.dtype:
        """The dtype in which products with another site's rows are formed: float64 for narrow rows, otherwise that of the rows."""
        narrow = min(self.raw.shape[1], other.raw.shape[1]) <= NARROW
        return torch.float64 if narrow or self.raw.dtype != other.raw.dtype else self.raw.dtype

    def products(self, other: "Rows") -> Tensor:
        """Sum of products with the same rows of another site, (width, other width) float64.

        Each is about its own shift, and masked rows are 0 at both. The kind of product depends on the memory layout.
        """
        x = self.x.to(self.product_dtype(other))
        z = x if other is self else other.x.to(x.dtype)
        (_, width, positions), other_width = x.shape, z.shape[1]
        with exact_products():
            if positions == 1 or (x.stride(1) == 1 and z.stride(1) == 1):
                flat = x.transpose(1, 2).reshape(-1, width)
                return (flat.T @ (flat if z is x else z.transpose(1, 2).reshape(-1, other_width))).double()
            if positions >= min(width, other_width):
                return x.new_zeros(width, other_width).addbmm_(x, z.transpose(1, 2)).double()
            flat = x.transpose(0, 1).reshape(width, -1)
            return (flat @ (flat if z is x else z.transpose(0, 1).reshape(other_width, -1)).T).double()

    @property
    def mean(self) -> Tensor:
        """(width,) float64; 0 without rows."""
        return self.shift + self.total / self.n.clamp_min(1)

    def pilot(self, far: float = FAR) -> Tensor:
        """The shift for all later rows: the mean if that of some unit exceeds ``far`` standard deviations, else 0 (saves a copy).

        About zero, the rounding error of a variance is 1 + (mean/std)^2 times that of its sums.
        """
        about = self.about(self.mean)
        variance = about.square / self.n.clamp_min(1)
        beyond = (about.shift.square() > far**2 * variance) & (about.shift != 0)
        return about.shift.where(beyond.any(), 0)

    @cached_property
    def magnitude(self) -> Tensor:
        """|value|, not shifted, (samples, width, positions); 0 for masked rows."""
        size = self.raw.abs()
        return size if self.keep is None else size.where(self.keep[:, None], 0)

    @property
    def absolute(self) -> Tensor:
        """Sum of |value|, (width,) float64."""
        return self.magnitude.sum(2).sum(0, dtype=torch.float64)

    @property
    def nonzero(self) -> Tensor:
        """Number of non-zero values, (width,) int64."""
        return self._nonzeros.sum(0, dtype=torch.float64).round().long()

    @property
    def _nonzeros(self) -> Tensor:
        size = self.magnitude
        if self.keep is None and size.device.type == "cpu" and size.numel() and float(size.amin()) > 0:
            return size.new_full(size.shape[:2], size.shape[2])  # usual before an activation; saves one pass
        return size.sign().sum(2)

    def sample_means(self) -> "Rows":
        """One row per sample: the mean over its positions. A sample without valid positions is masked."""
        if self.raw.shape[2] == 1:
            return Rows(self.raw, self.keep, self.shift, (), self.shifted)
        return self.by_sample().means()

    def sample_totals(self) -> "Rows":
        """One row per sample: the sum over its positions."""
        return self.by_sample().totals()

    def by_sample(self, *more: str) -> "SampleSums":
        """Sums over the positions of each sample; ``squares``, ``absolutes`` and ``nonzeros`` only if named.

        ``fourths`` includes the third and second powers.
        """
        found: dict[str, Tensor] = {}
        if "squares" in more or "fourths" in more:
            found["squares"] = torch.linalg.vector_norm(self.x, dim=2).square()
        if "fourths" in more:
            square = self.x.square()
            found["cubes"], found["fourths"] = (square * self.x).sum(2), torch.linalg.vector_norm(square, dim=2).square()
        if "absolutes" in more or "nonzeros" in more:
            found["absolutes"] = self.magnitude.sum(2)
        if "nonzeros" in more:
            found["nonzeros"] = self._nonzeros
        return SampleSums(self.counts, self.shift, self.sample_sums, self.keep is not None, **found)


@dataclass(frozen=True, eq=False)
class SampleSums:
    """Sums over the positions of each sample, from which all statistics without products of units are computed.

    Shapes: counts (samples, 1) int64, rows that count; shift (width,); each sum (samples, width) or None
    """

    counts: Tensor
    shift: Tensor
    sums: Tensor
    masked: bool = False
    squares: Tensor | None = None
    absolutes: Tensor | None = None
    nonzeros: Tensor | None = None
    cubes: Tensor | None = None
    fourths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.counts)

    def tables(self) -> dict[str, Tensor]:
        """All fields with one row per sample, by name; the inverse of ``of_tables``."""
        names = ("counts", "sums", "squares", "absolutes", "nonzeros", "cubes", "fourths")
        found = {name: getattr(self, name) for name in names}
        return {name: table for name, table in found.items() if table is not None}

    @classmethod
    def of_tables(cls, tables: dict[str, Tensor], shift: Tensor, masked: bool = True) -> "SampleSums":
        """Sums about a shift from the result of ``tables``."""
        return cls(shift=shift, masked=masked, **tables)

    def map(self, change: Callable[[Tensor], Tensor]) -> "SampleSums":
        """The same with a function applied to each table."""
        return self.of_tables({k: change(t) for k, t in self.tables().items()}, self.shift, self.masked)

    @classmethod
    def cat(cls, parts: list["SampleSums"]) -> "SampleSums":
        """Concatenate the samples of several parts about the same shift."""
        if len(parts) == 1:
            return parts[0]
        every = [p.tables() for p in parts]
        joined = {name: torch.cat([tables[name] for tables in every]) for name in every[0]}
        return cls.of_tables(joined, parts[0].shift, any(p.masked for p in parts))

    @property
    def n(self) -> Tensor:
        return self.counts.sum().reshape(1)

    @property
    def total(self) -> Tensor:
        return self.sums.sum(0, dtype=torch.float64)

    @property
    def square(self) -> Tensor:
        return _known(self.squares).sum(0, dtype=torch.float64)

    @property
    def cube(self) -> Tensor:
        return _known(self.cubes).sum(0, dtype=torch.float64)

    @property
    def fourth(self) -> Tensor:
        return _known(self.fourths).sum(0, dtype=torch.float64)

    @property
    def absolute(self) -> Tensor:
        return _known(self.absolutes).sum(0, dtype=torch.float64)

    @property
    def nonzero(self) -> Tensor:
        return _known(self.nonzeros).sum(0, dtype=torch.float64).round().long()

    def means(self) -> Rows:
        """One row per sample: its mean."""
        x = self.sums / self.counts.clamp_min(1) + self.shift.to(self.sums.dtype)
        return Rows(x[:, :, None], self.counts > 0 if self.masked else None, self.shift)

    def totals(self) -> Rows:
        """One row per sample: its sum."""
        x = self.sums + (self.counts * self.shift).to(self.sums.dtype)
        return Rows(x[:, :, None], self.counts > 0 if self.masked else None, torch.zeros_like(self.shift), (), False)


def _known(table: Tensor | None) -> Tensor:
    if table is None:
        raise ValueError("these per-sample sums were not computed: name them in by_sample()")
    return table
