"""Products of units that are not centred: of vectors, such as derivatives, of which a row may have several."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from .base import Statistic
from .rows import Rows


class Vectors(NamedTuple):
    """Some of the vectors of each row: ``x`` of as many samples as there are vectors times samples; ``y`` their partners, or None.

    fold: which of the ``folds`` of the vectors they belong to; n: the rows that they are the first vectors of, (1,) int64
    gram: (d, d) float64 or None. Each p then stands for vectors p * u, with any u of which u u' adds up to ``gram``
    """

    x: Rows
    y: Rows | None
    fold: int
    folds: int
    n: Tensor
    gram: Tensor | None = None

    @property
    def outer(self) -> Tensor:
        """Sum of p p', or of (p q' + q p') / 2 for partners q, (d, d) float64."""
        if self.y is None:
            return self.x.outer if self.gram is None else self.x.outer * self.gram
        mixed = self.x.products(self.y)
        return (mixed + mixed.T) / 2


@dataclass(frozen=True, eq=False)
class Products(Statistic):
    """Number of rows, and the sum over rows of p p' of all vectors p (d,) of a row, in folds of the vectors.

    Vectors are scaled so that the sum over all of a row is what is averaged over rows.
    """

    n: Tensor  # (1,)           int64    rows, each counted once, whatever the number of its vectors
    vectors: Tensor  # (folds,)       int64    vectors of all rows in each fold
    outer: Tensor  # (folds, d, d)  float64

    @classmethod
    def of(cls, x: Rows | Tensor | Vectors, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        """From some vectors of each row; rows or a tensor are one vector per row, in one fold."""
        if not isinstance(x, Vectors):
            rows = Rows.of(x, weights)
            x = Vectors(about_zero(rows), None, 0, 1, rows.n)
        outer = x.outer
        every, vectors = outer.new_zeros(x.folds, *outer.shape), torch.zeros(x.folds, dtype=torch.int64, device=outer.device)
        every[x.fold], vectors[x.fold] = outer, x.x.n
        return cls(x.n.clone(), vectors, every)

    def add_rows_in_place(self, rows: Any) -> bool:
        if not isinstance(rows, Vectors):
            return False
        self.n.add_(rows.n)
        self.vectors[rows.fold].add_(rows.x.n[0])
        self.outer[rows.fold].add_(rows.outer)
        return True

    @property
    def mean(self) -> Tensor:
        """Mean over rows, (d, d); NaN without rows."""
        return self.outer.sum(0) / self.n

    @property
    def by_fold(self) -> Tensor:
        """The mean over rows as each fold alone estimates it, (folds, d, d)."""
        share = self.vectors.double() / self.vectors.sum()
        return self.outer / self.n / share[:, None, None]


def about_zero(rows: Rows) -> Rows:
    """Rows that are not shifted."""
    return rows.about(torch.zeros(rows.raw.shape[1], dtype=torch.float64, device=rows.raw.device), shifted=False)
