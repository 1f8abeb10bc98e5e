"""Rows: what passed at a site, in one layout, with the few reductions that all statistics are made of."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .linalg import exact_products

FAR = 1.0  # means beyond this many spreads are taken off before long float32 sums are formed
NARROW = 32  # units up to which a product costs less than reading its rows: it is taken in float64


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one site about a shift; those not kept vanish from every sum.

    Shapes: raw (samples, width, positions) of any strides; keep (samples, positions) bool or None for all;
            shift (width,) float64; grid the positions' own shape, () for one position a sample
    """

    raw: Tensor
    keep: Tensor | None = None
    shift: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    grid: tuple[int, ...] = ()
    moved: bool = True  # False where the shift is known to be zero: asking a tensor would stall a GPU

    @classmethod
    def of(cls, x: "Rows | Tensor", weights: Tensor | None = None, shift: Tensor | None = None) -> "Rows":
        """Rows of a tensor (n, width), or of (samples, width, positions); weights (n,) bool. Without a shift: about the mean."""
        if isinstance(x, Rows):
            return x if shift is None else x.about(shift)
        if x.ndim == 2:
            x, weights = x[:, :, None], None if weights is None else weights.reshape(-1, 1).bool()
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        rows = cls(x, weights, torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)).finite()
        return rows.about(rows.mean if shift is None else shift)

    def __len__(self) -> int:
        return len(self.raw)

    def about(self, shift: Tensor, moved: bool = True) -> "Rows":
        """The same rows about another shift; ``moved`` is False for a shift of zero."""
        return Rows(self.raw, self.keep, shift, self.grid, moved)

    def take(self, first: int, last: int) -> "Rows":
        """The rows of samples first..last-1, without a copy."""
        keep = None if self.keep is None else self.keep[first:last]
        part = Rows(self.raw[first:last], keep, self.shift, self.grid, self.moved)
        for name in ("x", "sample_sums"):  # what is formed already is sliced, not formed again
            if name in self.__dict__:
                part.__dict__[name] = self.__dict__[name][first:last]
        return part

    def index(self, samples: Tensor) -> "Rows":
        """The rows of some samples, copied."""
        return Rows(self.raw[samples], None if self.keep is None else self.keep[samples], self.shift, self.grid)

    def at(self, places: Tensor) -> "Rows":
        """The rows at some positions of each sample, places (samples, count) int64; copied."""
        places = places.to(self.raw.device)
        raw = self.raw[torch.arange(len(places), device=places.device)[:, None], :, places].transpose(1, 2)
        return Rows(raw, None if self.keep is None else self.keep.gather(1, places), self.shift, (), self.moved)

    def copy(self) -> "Rows":
        """The same rows in memory of their own."""
        return Rows(self.raw.clone(), self.keep, self.shift, self.grid)

    def kept(self, keep: Tensor | None) -> "Rows":
        """The same rows, those kept that are marked, (samples, positions) bool."""
        return Rows(self.raw, keep, self.shift, self.grid, self.moved)

    def double(self) -> "Rows":
        """The same rows in float64."""
        double = self.raw.dtype == torch.float64
        return self if double else Rows(self.raw.double(), self.keep, self.shift, self.grid, self.moved)

    def mask(self) -> Tensor:
        """Which rows count, (samples, positions) bool."""
        return torch.ones_like(self.raw[:, 0], dtype=torch.bool) if self.keep is None else self.keep

    def finite(self) -> "Rows":
        """Without the rows that hold a NaN or an infinity."""
        if self.x.device.type == "cpu" and math.isfinite(float(self.sample_sums.sum())):
            return self  # one that is not finite shows in its sum; elsewhere asking would stall the device
        finite = self.raw.isfinite().all(1)
        return Rows(self.raw, finite if self.keep is None else self.keep & finite, self.shift, self.grid, self.moved)

    @cached_property
    def x(self) -> Tensor:
        """Values about the shift, (samples, width, positions); 0 where a row is not kept."""
        x = self.raw
        if self.moved:
            x = x - self.shift.to(x.dtype)[:, None]
        return x if self.keep is None else x.where(self.keep[:, None], 0)

    @cached_property
    def n(self) -> Tensor:
        """Rows that count, (1,) int64."""
        samples, _, positions = self.raw.shape
        if self.keep is None:
            return torch.full((1,), samples * positions, device=self.raw.device)
        return self.keep.sum().reshape(1)

    @cached_property
    def counts(self) -> Tensor:
        """Rows that count in each sample, (samples, 1) int64."""
        samples, _, positions = self.raw.shape
        if self.keep is None:
            return torch.full((samples, 1), positions, device=self.raw.device)
        return self.keep.sum(1, keepdim=True)

    @cached_property
    def sample_sums(self) -> Tensor:
        """Sums about the shift over each sample's positions, (samples, width)."""
        return self.x[:, :, 0] if self.x.shape[2] == 1 else self.x.sum(2)

    @cached_property
    def norms(self) -> Tensor:
        """Squared length of each row about the shift, (samples, positions); 0 where a row is not kept."""
        return self.x.square().sum(1)

    @property
    def total(self) -> Tensor:
        """Sum about the shift, (width,) float64."""
        return self.sample_sums.sum(0, dtype=torch.float64)

    @property
    def square(self) -> Tensor:
        """Sum of squares about the shift, (width,) float64."""
        norms = torch.linalg.vector_norm(self.x, dim=2)  # the one reduction of squares that makes no copy
        return norms.double().square().sum(0)

    @property
    def outer(self) -> Tensor:
        """Sum of products about the shift, (width, width) float64."""
        return self.products(self)

    def products(self, other: "Rows") -> Tensor:
        """Sum of products with the same rows of another site, (width, other width) float64, by the product that suits the layout.

        Each about its shift, and both with 0 where a row is not kept.
        """
        x = self.x
        z = x if other is self else other.x
        if min(x.shape[1], z.shape[1]) <= NARROW or x.dtype != z.dtype:
            x = x.double()
            z = x if other is self else z.double()
        (_, width, positions), beside = x.shape, z.shape[1]
        with exact_products():
            if positions == 1 or (x.stride(1) == 1 and z.stride(1) == 1):
                flat = x.transpose(1, 2).reshape(-1, width)
                return (flat.T @ (flat if z is x else z.transpose(1, 2).reshape(-1, beside))).double()
            if positions >= min(width, beside):
                return x.new_zeros(width, beside).addbmm_(x, z.transpose(1, 2)).double()
            flat = x.transpose(0, 1).reshape(width, -1)
            return (flat @ (flat if z is x else z.transpose(0, 1).reshape(beside, -1)).T).double()

    @property
    def mean(self) -> Tensor:
        """(width,) float64; 0 without rows."""
        return self.shift + self.total / self.n.clamp_min(1)

    def pilot(self, far: float = FAR) -> Tensor:
        """A shift for all that follows: the mean where some unit's lies ``far`` spreads from zero, else zero, which costs no copy.

        About zero a variance loses 1 + (mean/spread)^2 roundings of its sums.
        """
        about = self.about(self.mean)
        spread = about.square / self.n.clamp_min(1)
        beyond = (about.shift.square() > far**2 * spread) & (about.shift != 0)
        return about.shift.where(beyond.any(), 0)

    @cached_property
    def magnitude(self) -> Tensor:
        """|value|, not about the shift, (samples, width, positions); 0 where a row is not kept."""
        size = self.raw.abs()
        return size if self.keep is None else size.where(self.keep[:, None], 0)

    @property
    def absolute(self) -> Tensor:
        """Sum of |value|, (width,) float64."""
        return self.magnitude.sum(2).sum(0, dtype=torch.float64)

    @property
    def nonzero(self) -> Tensor:
        """Values other than zero, (width,) int64."""
        return self._nonzeros.sum(0, dtype=torch.float64).round().long()

    @property
    def _nonzeros(self) -> Tensor:
        size = self.magnitude
        if self.keep is None and size.device.type == "cpu" and size.numel() and float(size.amin()) > 0:
            return size.new_full(size.shape[:2], size.shape[2])  # the usual case before an activation: one pass less
        return size.sign().sum(2)

    def sample_means(self) -> "Rows":
        """One row a sample: the mean over its positions. A sample without any is not kept."""
        if self.raw.shape[2] == 1:
            return Rows(self.raw, self.keep, self.shift, (), self.moved)
        return self.by_sample().means()

    def sample_totals(self) -> "Rows":
        """One row a sample: the sum over its positions."""
        return self.by_sample().totals()

    def by_sample(self, *more: str) -> "SampleSums":
        """Sums over each sample's positions; of ``squares``, ``absolutes`` and ``nonzeros`` those that are named.

        ``fourths`` come with the powers below them.
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
    """Rows of positions, already added up within each sample: what statistics without products of units are made of.

    Shapes: counts (samples, 1) int64, rows that count; shift (width,); the sums (samples, width) or None
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
        """What has a row a sample, by name; ``of_tables`` goes back."""
        names = ("counts", "sums", "squares", "absolutes", "nonzeros", "cubes", "fourths")
        found = {name: getattr(self, name) for name in names}
        return {name: table for name, table in found.items() if table is not None}

    @classmethod
    def of_tables(cls, tables: dict[str, Tensor], shift: Tensor, masked: bool = True) -> "SampleSums":
        """Sums about a shift from their tables."""
        return cls(shift=shift, masked=masked, **tables)

    def map(self, change: Callable[[Tensor], Tensor]) -> "SampleSums":
        """The same with a function applied to each table."""
        return self.of_tables({k: change(t) for k, t in self.tables().items()}, self.shift, self.masked)

    @classmethod
    def cat(cls, parts: list["SampleSums"]) -> "SampleSums":
        """Samples of several parts about one shift, one after another."""
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
        """One row a sample: its mean."""
        x = self.sums / self.counts.clamp_min(1) + self.shift.to(self.sums.dtype)
        return Rows(x[:, :, None], self.counts > 0 if self.masked else None, self.shift)

    def totals(self) -> Rows:
        """One row a sample: its sum."""
        x = self.sums + (self.counts * self.shift).to(self.sums.dtype)
        return Rows(x[:, :, None], self.counts > 0 if self.masked else None, torch.zeros_like(self.shift), (), False)


def _known(table: Tensor | None) -> Tensor:
    if table is None:
        raise ValueError("these sums over samples were not asked for")
    return table
