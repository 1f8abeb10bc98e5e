"""Sums of products of unit outputs, and of their gradients, with unit inputs, in the shape of the layer's weight."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .base import Statistic
from .linalg import exact_products


@dataclass(frozen=True, eq=False)
class WeightSums(Statistic):
    """Sums over rows of y x', g x' and x, for unit inputs x, outputs y and gradients g = dL/dy of the summed loss L.

    The sum of g x' is the gradient of the loss with respect to the weight. For a convolution x is a patch in the order of
    the flattened weight; with groups, the entries of the groups follow one another.
    """

    n: Tensor  # (1,)                  int64    rows
    hebbian: Tensor  # (units, fan_in)       float64  sum of y x'
    gradient: Tensor  # (units, fan_in)       float64  sum of g x'
    inputs: Tensor  # (groups x fan_in,)    float64  sum of x

    @classmethod
    def of(cls, x: Tensor, y: Tensor, g: Tensor, weights: Tensor | None = None, groups: int = 1) -> Self:
        """From x (rows, groups x fan_in), y and g (rows, units), weights (rows,) bool; a row that is not finite is left out.

        Raises ValueError if the numbers of rows differ.
        """
        if not len(x) == len(y) == len(g) or y.shape[1] != g.shape[1]:
            raise ValueError(f"inputs {tuple(x.shape)}, outputs {tuple(y.shape)}, gradients {tuple(g.shape)}: rows differ")
        keep = x.isfinite().all(1) & y.isfinite().all(1) & g.isfinite().all(1)
        keep = keep if weights is None else keep & weights.bool()
        read, out, grad = (_Centred.of(t, keep, groups) for t in (x, y, g))
        return cls(keep.sum().reshape(1), out.times(read), grad.times(read), read.sums.flatten())


@dataclass(frozen=True, eq=False)
class _Centred:
    """Rows about a shift near their mean, per group: float32 products of rows far from zero would cancel."""

    rows: Tensor  # (groups, rows, width)
    shift: Tensor  # (groups, 1, width)  float64
    n: Tensor  # ()

    @classmethod
    def of(cls, x: Tensor, keep: Tensor, groups: int) -> Self:
        x = x.to(torch.promote_types(x.dtype, torch.float32)).where(keep[:, None], 0)
        shift = (x.sum(0, dtype=torch.float64) / keep.sum().clamp_min(1)).to(x.dtype)
        rows = (x - shift).where(keep[:, None], 0).unflatten(1, (groups, -1)).transpose(0, 1)
        return cls(rows, shift.double().reshape(groups, 1, -1), keep.sum())

    @property
    def total(self) -> Tensor:
        return self.rows.sum(1, keepdim=True, dtype=torch.float64)  # (groups, 1, width)

    @property
    def sums(self) -> Tensor:
        return self.total + self.n * self.shift

    def times(self, other: "_Centred") -> Tensor:
        """Sum over rows of the products, not shifted, (groups x width, width) float64."""
        dtype = torch.promote_types(self.rows.dtype, other.rows.dtype)
        with exact_products():
            product = (self.rows.to(dtype).mT @ other.rows.to(dtype)).double()
        return (product + self.shift.mT @ other.sums + self.total.mT @ other.shift).flatten(0, 1)
