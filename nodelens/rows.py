"""Rows: what passed at a site, in one layout, with the few reductions that all statistics are made of."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .linalg import exact_products

FAR = 1.0  # means beyond this many spreads are taken off before products are formed


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

    def about(self, shift: Tensor) -> "Rows":
        """The same rows about another shift."""
        return Rows(self.raw, self.keep, shift, self.grid)

    def take(self, first: int, last: int) -> "Rows":
        """The rows of samples first..last-1, without a copy."""
        keep = None if self.keep is None else self.keep[first:last]
        return Rows(self.raw[first:last], keep, self.shift, self.grid)

    def index(self, samples: Tensor) -> "Rows":
        """The rows of some samples, copied."""
        return Rows(self.raw[samples], None if self.keep is None else self.keep[samples], self.shift, self.grid)

    def copy(self) -> "Rows":
        """The same rows in memory of their own."""
        return Rows(self.raw.clone(), self.keep, self.shift, self.grid)

    def finite(self) -> "Rows":
        """Without the rows that hold a NaN or an infinity."""
        if self.x.device.type == "cpu" and bool(self.sample_sums.isfinite().all()):
            return self  # one that is not finite shows in its sum; elsewhere asking would stall the device
        finite = self.raw.isfinite().all(1)
        return Rows(self.raw, finite if self.keep is None else self.keep & finite, self.shift, self.grid)

    @cached_property
    def x(self) -> Tensor:
        """Values about the shift, (samples, width, positions); 0 where a row is not kept."""
        x = self.raw
        if bool(self.shift.any()):
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
        """Sum of products about the shift, (width, width) float64, by the product that suits the layout."""
        x = self.x
        samples, width, positions = x.shape
        with exact_products():
            if x.stride(1) == 1 or positions == 1:
                flat = x.transpose(1, 2).reshape(-1, width)
                return (flat.T @ flat).double()
            if positions >= width:
                return x.new_zeros(width, width).addbmm_(x, x.transpose(1, 2)).double()
            flat = x.transpose(0, 1).reshape(width, -1)
            return (flat @ flat.T).double()

    @property
    def mean(self) -> Tensor:
        """(width,) float64; 0 without rows."""
        return self.shift + self.total / self.n.clamp_min(1)

    @property
    def pilot(self) -> Tensor:
        """A shift for all that follows: the mean where some unit's lies far from zero, else zero, which costs no copy.

        About zero a variance loses 1 + (mean/spread)^2 roundings: two at most inside `FAR` spreads.
        """
        about = self.about(self.mean)
        spread = about.square / self.n.clamp_min(1)
        far = (about.shift.square() > FAR**2 * spread) & (about.shift != 0)
        return about.shift.where(far.any(), 0)

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
        return self.magnitude.sign().sum(2).sum(0, dtype=torch.float64).round().long()

    def sample_means(self) -> "Rows":
        """One row a sample: the mean over its positions. A sample without any is not kept."""
        counts = self.counts
        if self.raw.shape[2] == 1:
            return Rows(self.raw, self.keep, self.shift)
        x = (self.sample_sums / counts.clamp_min(1)).to(self.x.dtype)
        keep = None if self.keep is None else counts > 0
        return Rows(x[:, :, None] + self.shift.to(x.dtype)[:, None], keep, self.shift)

    def sample_totals(self) -> "Rows":
        """One row a sample: the sum over its positions."""
        x = self.about(torch.zeros_like(self.shift)).sample_sums
        keep = None if self.keep is None else self.counts > 0
        return Rows(x[:, :, None], keep, torch.zeros_like(self.shift))
