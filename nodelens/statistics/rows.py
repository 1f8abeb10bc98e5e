"""Rows: the tensors seen at a site, in one layout, with the reductions from which all statistics are computed."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from . import compiled, kernels, triangle
from .linalg import by_unit, exact_products, gram_of_rows, maps_by_sample, side_by_side, sum_of_products
from .reductions import reduce
from .sample_sums import SampleSums

FAR = 1.0  # means larger than this many standard deviations are subtracted before long float32 sums
_POWERS = ("squares", "cubes", "fourths")
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
    scale: Tensor | None = None  # (samples, positions) of ``directions`` that compiled loops read unscaled

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
        raw = self.raw if self.scale is None else self.x  # directions lie about zero
        return Rows(raw, self.keep, shift, self.grid, shifted)

    def take(self, first: int, last: int) -> "Rows":
        """The rows of samples first..last-1, as views."""
        keep = None if self.keep is None else self.keep[first:last]
        scale = None if self.scale is None else self.scale[first:last]
        part = replace(self, raw=self.raw[first:last], keep=keep, scale=scale)
        part.ready.update({name: t[first:last] for name, t in self.ready.items()})  # instead of computing them again
        if "directions" in self.__dict__:
            part.__dict__["directions"] = self.directions.take(first, last)
        return part

    def prepared(self, wanted: Collection[str], samples: Tensor | None = None) -> "Rows":
        """The same rows with sums that are computed together, as ``reduce`` names them, and their ``directions`` if named.

        samples: as there; chosen samples are copied.
        """
        rows, names = self, [name for name in wanted if name != "directions"]
        if samples is None:
            self.sums(*names)
        else:
            found = self._reduce(names, samples)
            keep = self.keep if self.keep is None else self.keep[samples.to(self.keep.device)]
            rows = Rows(found.pop("raw"), keep, self.shift, self.grid, self.shifted)
            rows.ready.update(found)
        if "directions" in wanted:
            rows.directions.sums("sums")
        return rows

    @cached_property
    def ready(self) -> dict[str, Tensor]:
        """What was computed of these rows, by the names of ``reduce``."""
        return {}

    def sums(self, *wanted: str) -> list[Tensor]:
        """What ``reduce`` returns under these names, computed at most once."""
        missing = [name for name in wanted if name not in self.ready]
        if missing:
            self.ready.update({name: t for name, t in self._reduce(missing).items() if name != "raw"})
        return [self.ready[name] for name in wanted]

    def _reduce(self, wanted: Collection[str], samples: Tensor | None = None) -> dict[str, Tensor]:
        if self.scale is not None:
            if {*wanted} == {"sums"}:
                return {"sums": compiled.weighted_sums(self.raw, self.keep, self.scale)}
            return reduce(self.x, wanted=wanted)
        if samples is None and "x" in self.ready and not {"absolutes", "nonzeros", "largest"} & {*wanted}:
            return reduce(self.ready["x"], wanted=wanted)
        return reduce(self.raw, self.keep, self.shift if self.shifted else None, wanted, samples)

    def index(self, samples: Tensor) -> "Rows":
        """The rows of some samples, as copies; samples (n,) int64, or (samples,) bool."""
        samples = samples.to(self.raw.device)
        samples = samples.nonzero()[:, 0] if samples.dtype == torch.bool else samples
        keep, scale = (None if each is None else each[samples] for each in (self.keep, self.scale))
        return replace(self, raw=self.raw.index_select(0, samples), keep=keep, scale=scale)

    def at(self, places: Tensor) -> "Rows":
        """The rows at some positions of each sample, places (samples, count) int64, as copies."""
        places = places.to(self.raw.device)
        raw = self.raw[torch.arange(len(places), device=places.device)[:, None], :, places].transpose(1, 2)
        keep, scale = (None if each is None else each.gather(1, places) for each in (self.keep, self.scale))
        return replace(self, raw=raw, keep=keep, grid=(), scale=scale)

    def copy(self) -> "Rows":
        """The same rows in newly allocated memory."""
        return replace(self, raw=self.raw.clone())

    def kept(self, keep: Tensor | None) -> "Rows":
        """The same rows with another mask, (samples, positions) bool."""
        return replace(self, keep=keep)

    def only(self, samples: Tensor) -> "Rows":
        """The same rows with those of other samples masked, samples (samples,) bool."""
        if samples.device.type == "cpu" and bool(samples.all()):  # on a GPU the check would synchronise
            return self
        return self.kept(self.mask() & samples[:, None])

    def double(self) -> "Rows":
        """The same rows in float64."""
        return self if self.raw.dtype == torch.float64 else replace(self, raw=self.raw.double())

    def mask(self) -> Tensor:
        """The mask of rows that count, (samples, positions) bool."""
        return torch.ones_like(self.raw[:, 0], dtype=torch.bool) if self.keep is None else self.keep

    def finite(self) -> "Rows":
        """The same rows with those masked that contain a NaN or an infinity."""
        if self.raw.device.type == "cpu" and math.isfinite(float(self.sample_sums.sum())):
            return self  # a non-finite value makes the sum non-finite; on a GPU the check would synchronise
        finite = self.raw.isfinite().all(1)
        return self.kept(finite if self.keep is None else self.keep & finite)

    @property
    def x(self) -> Tensor:
        """Values about the shift, (samples, width, positions); 0 for masked rows."""
        x = self.ready.get("x")
        if x is None:
            x = self.raw - self.shift.to(self.raw.dtype)[:, None] if self.shifted else self.raw
            x = x if self.scale is None else x * self.scale[:, None]
            x = self.ready["x"] = x if self.keep is None else x.where(self.keep[:, None], 0)
        return x

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

    @property
    def sample_sums(self) -> Tensor:
        """Sums about the shift over the positions of each sample, (samples, width)."""
        return self.sums("sums")[0]

    @property
    def squared_norms(self) -> Tensor:
        """Squared norm of each row about the shift, (samples, positions); 0 for masked rows."""
        return self.sums("norms")[0]

    @cached_property
    def inverse_norms(self) -> tuple[Tensor, Tensor | None]:
        """1 / norm of each row, not shifted, (samples, positions), and the mask of rows with a non-zero norm; None if all have."""
        square = Rows(self.raw, self.keep, shifted=False).squared_norms if self.shifted else self.squared_norms
        nonzero = (square > 0) & square.isfinite()
        keep = nonzero if self.keep is None else nonzero & self.keep
        scale = square.where(nonzero, 1).rsqrt()
        return scale, None if bool(keep.all()) else keep

    @cached_property
    def directions(self) -> "Rows":
        """Each row, not shifted, scaled to unit norm; rows of norm zero are masked."""
        scale, keep = self.inverse_norms
        if self.compiles_products:
            return Rows(self.raw, keep, torch.zeros_like(self.shift), self.grid, False, scale)
        unit = self.raw * scale[:, None]
        unit = unit if keep is None else unit.where(keep[:, None], 0)
        return Rows(unit, keep, torch.zeros_like(self.shift), self.grid, False)

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
        if other is self and self.compiles_products:
            held = torch.zeros(triangle.size(self.raw.shape[1]), dtype=torch.float64)
            self.add_products(held)
            return triangle.unpack(held, self.raw.shape[1])
        x, z, dtype = self.x, other.x, self.product_dtype(other)
        with exact_products():
            if maps_by_sample(x, z):
                return sum_of_products(x, z, dtype)
            x = x.to(dtype)
            z = x if other is self else z.to(dtype)
            flat = by_unit(x)
            return (gram_of_rows(flat) if z is x else flat @ by_unit(z).T).double()

    @property
    def compiles_products(self) -> bool:
        """Whether compiled loops form its products with themselves: those of maps that are not narrow."""
        by_sample = self.raw.shape[1] > NARROW and maps_by_sample(self.raw, self.raw)
        return by_sample and kernels.compiled_for(self.raw) is not None

    def add_products(self, held: Tensor, chosen: Sequence[int] | None = None) -> None:
        """Adds the sum of products of some samples, None for all, to what ``triangle`` holds of a matrix, by compiled loops."""
        compiled.add_products(held, self.raw, self.keep, self.shift if self.shifted else None, self.scale, chosen)

    def products_by_run(self, other: "Rows", runs: Sequence[tuple[int, int]]) -> Tensor:
        """The same for each of some runs of consecutive samples, (first, end), (runs, width, other width) float64."""
        if not (side_by_side(self.x) and side_by_side(other.x)):
            parts = [(self.take(a, b), other.take(a, b)) for a, b in runs]
            return torch.stack([mine.products(mine if other is self else theirs) for mine, theirs in parts])
        x = self.x.to(self.product_dtype(other))
        z, positions = x if other is self else other.x.to(x.dtype), x.shape[2]
        own, its = by_unit(x), None if z is x else by_unit(z)
        spans = [slice(a * positions, b * positions) for a, b in runs]
        with exact_products():
            found = [gram_of_rows(own[:, span]) if its is None else own[:, span] @ its[:, span].T for span in spans]
        return torch.stack(found).double()

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

    @property
    def absolute(self) -> Tensor:
        """Sum of |value|, (width,) float64."""
        return self.sums("absolutes")[0].sum(0, dtype=torch.float64)

    @property
    def nonzero(self) -> Tensor:
        """Number of non-zero values, (width,) int64."""
        return self.sums("nonzeros")[0].sum(0, dtype=torch.float64).round().long()

    @property
    def largest(self) -> Tensor:
        """The largest |value|, (width,) float64; 0 without rows."""
        (found,) = self.sums("largest")
        return found.amax(0).double() if len(found) else found.new_zeros(found.shape[1]).double()

    def sample_means(self) -> "Rows":
        """One row per sample: the mean over its positions. A sample without valid positions is masked."""
        if self.raw.shape[2] == 1:
            return replace(self, grid=())
        return means_of(self.by_sample())

    def sample_totals(self) -> "Rows":
        """One row per sample: the sum over its positions."""
        return totals_of(self.by_sample())

    def by_sample(self, *more: str) -> SampleSums:
        """Sums over the positions of each sample, and those named, as in ``reduce``; ``fourths`` includes the lower powers."""
        names = dict.fromkeys(name for each in more for name in (_POWERS if each == "fourths" else (each,)))
        found = dict(zip(names, self.sums("sums", *names)[1:], strict=True))
        return SampleSums(self.counts, self.shift, self.sample_sums, self.keep is not None, **found)


def means_of(sums: SampleSums) -> Rows:
    """One row per sample: its mean."""
    x = sums.sums / sums.counts.clamp_min(1) + sums.shift.to(sums.sums.dtype)
    return Rows(x[:, :, None], sums.counts > 0 if sums.masked else None, sums.shift)


def totals_of(sums: SampleSums) -> Rows:
    """One row per sample: its sum."""
    x = sums.sums + (sums.counts * sums.shift).to(sums.sums.dtype)
    return Rows(x[:, :, None], sums.counts > 0 if sums.masked else None, torch.zeros_like(sums.shift), (), False)
