"""Rows that wait for company, in memory taken once."""

import torch
from torch import Tensor


class Buffer:
    """Tables of rows side by side, filled from the front; emptied when it is full.

    The memory is taken at the first row and kept: what is held over many batches in small pieces would tear the heap.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.tables: dict[str, Tensor] = {}
        self.filled = 0

    def fits(self, **tables: Tensor) -> bool:
        """Whether rows of these shapes can join those that wait."""
        room = self.filled + len(next(iter(tables.values()))) <= self._room()
        return not self.filled or (room and all(t.shape[1:] == self.tables[k].shape[1:] for k, t in tables.items()))

    def put(self, **tables: Tensor) -> None:
        """Copies rows in. They must fit."""
        count = len(next(iter(tables.values())))
        if not self.filled and not (self.tables and count <= self._room() and self.fits_shape(**tables)):
            self.tables = {k: _like(t, max(count, self.capacity)) for k, t in tables.items()}
        for name, table in tables.items():
            self.tables[name][self.filled : self.filled + count].copy_(table)
        self.filled += count

    def fits_shape(self, **tables: Tensor) -> bool:
        """Whether the memory that is there has the shape of these rows."""
        return self.tables.keys() == tables.keys() and all(
            t.shape[1:] == self.tables[k].shape[1:] and t.dtype == self.tables[k].dtype for k, t in tables.items()
        )

    @property
    def full(self) -> bool:
        return self.filled >= self.capacity

    def take(self) -> dict[str, Tensor]:
        """What waits; it stays valid until the next ``put``."""
        found = {k: t[: self.filled] for k, t in self.tables.items()}
        self.filled = 0
        return found

    def _room(self) -> int:
        return len(next(iter(self.tables.values()))) if self.tables else self.capacity


def _like(table: Tensor, rows: int) -> Tensor:
    """Memory for more rows, laid out as the table is: units last where they are neighbours there."""
    if table.ndim == 3 and table.stride(1) == 1:
        return table.new_empty(rows, table.shape[2], table.shape[1]).transpose(1, 2)
    return torch.empty((rows, *table.shape[1:]), dtype=table.dtype, device=table.device)
