"""Sums of what units put out, and of its gradients, times what they read: the shape of a layer's weights."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .base import Statistic
from .linalg import exact_products


@dataclass(frozen=True, eq=False)
class WeightSums(Statistic):
    """Sums over rows of y x', g x' and x: x what the units read, y what they put out, g = dL/dy of the summed loss.

    The second is the gradient of the loss in the weights. Of a convolution x is a patch, its entries in the order of the
    flattened weight; with groups, one group's entries after another's.
    """

    n: Tensor  # (1,)                  int64    rows
    hebbian: Tensor  # (units, fan_in)       float64  sum of y x'
    gradient: Tensor  # (units, fan_in)       float64  sum of g x'
    inputs: Tensor  # (groups x fan_in,)    float64  sum of x

    @classmethod
    def of(cls, x: Tensor, y: Tensor, g: Tensor, weights: Tensor | None = None, groups: int = 1) -> Self:
        """Rows x (rows, groups x fan_in), y and g (rows, units), weights (rows,) bool; a row that is not finite is left out.

        Raises ValueError where their numbers differ.
        """
        if not len(x) == len(y) == len(g) or y.shape[1] != g.shape[1]:
            raise ValueError(f"inputs {tuple(x.shape)}, outputs {tuple(y.shape)} and gradients {tuple(g.shape)}: one row each")
        keep = x.isfinite().all(1) & y.isfinite().all(1) & g.isfinite().all(1)
        keep = keep if weights is None else keep & weights.bool()
        read, out, grad = (_Centred.of(t, keep, groups) for t in (x, y, g))
        return cls(keep.sum().reshape(1), out.times(read), grad.times(read), read.sums.flatten())


@dataclass(frozen=True, eq=False)
class _Centred:
    """Rows about a shift near their mean, by group: float32 products of rows far from zero would lose what differs."""

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
        """Sum over rows of their products, not about the shifts, (groups x width, width) float64."""
        dtype = torch.promote_types(self.rows.dtype, other.rows.dtype)
        with exact_products():
            product = (self.rows.to(dtype).mT @ other.rows.to(dtype)).double()
        return (product + self.shift.mT @ other.sums + self.total.mT @ other.shift).flatten(0, 1)
