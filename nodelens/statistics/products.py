"""Products of units that are not centred: of vectors, such as derivatives, of which a row may have several."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from .base import Statistic
from .rows import Rows


class Fold(NamedTuple):
    """What some vectors of each row add, all of them of one of the ``folds``.

    n: the number of rows that they are the first vectors of; vectors: their number; outer: the sum of p p', (d, d) float64
    """

    n: int
    vectors: int
    outer: Tensor
    fold: int = 0
    folds: int = 1


@dataclass(frozen=True, eq=False)
class Products(Statistic):
    """Number of rows, and the sum over rows of p p' of all vectors p (d,) of a row, in folds of the vectors.

    Vectors are scaled so that the sum over all of a row is what is averaged over rows.
    """

    n: Tensor  # (1,)           int64    rows, each counted once, whatever the number of its vectors
    vectors: Tensor  # (folds,)       int64    vectors of all rows in each fold
    outer: Tensor  # (folds, d, d)  float64

    @classmethod
    def of(cls, x: Rows | Tensor | Fold, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        """From some vectors of each row; rows or a tensor are one vector per row, in one fold."""
        if not isinstance(x, Fold):
            rows = about_zero(Rows.of(x, weights))
            x = Fold(int(rows.n), int(rows.n), rows.outer)
        every = x.outer.new_zeros(x.folds, *x.outer.shape)
        vectors = torch.zeros(x.folds, dtype=torch.int64, device=every.device)
        every[x.fold], vectors[x.fold] = x.outer, x.vectors
        return cls(torch.full((1,), x.n, device=every.device), vectors, every)

    def add_rows_in_place(self, rows: Any, *target: Tensor) -> bool:
        if not isinstance(rows, Fold):
            return False
        whole = rows.folds == 1  # indexing takes longer than adding
        self.n.add_(rows.n)
        (self.vectors if whole else self.vectors[rows.fold]).add_(rows.vectors)
        (self.outer if whole else self.outer[rows.fold]).add_(rows.outer)
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
