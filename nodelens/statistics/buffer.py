"""A buffer of rows, allocated once, that collects small batches until a matrix product is worth forming."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor


class Buffer:
    """Named tensors with one entry per buffered row, filled from the front and emptied when full.

    The memory is allocated at the first row and reused: holding many small tensors over batches would fragment the heap.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.tables: dict[str, Tensor] = {}
        self.filled = 0

    def fits(self, **tables: Tensor) -> bool:
        """Whether rows of these shapes can be appended to the buffered rows."""
        enough = self.filled + len(next(iter(tables.values()))) <= self._allocated()
        return not self.filled or (enough and all(t.shape[1:] == self.tables[k].shape[1:] for k, t in tables.items()))

    def put(self, **tables: Tensor) -> None:
        """Append copies of rows, which must fit."""
        count = len(next(iter(tables.values())))
        if not self.filled and not (self.tables and count <= self._allocated() and self._same_shape(**tables)):
            self.tables = {k: _empty_like(t, max(count, self.capacity)) for k, t in tables.items()}
        for name, table in tables.items():
            self.tables[name][self.filled : self.filled + count].copy_(table)
        self.filled += count

    def _same_shape(self, **tables: Tensor) -> bool:
        """Whether the allocated memory has the row shape and dtype of these tensors."""
        return self.tables.keys() == tables.keys() and all(
            t.shape[1:] == self.tables[k].shape[1:] and t.dtype == self.tables[k].dtype for k, t in tables.items()
        )

    @property
    def full(self) -> bool:
        return self.filled >= self.capacity

    def take(self) -> dict[str, Tensor]:
        """The buffered rows, as views that are valid until the next ``put``; empties the buffer."""
        found = {k: t[: self.filled] for k, t in self.tables.items()}
        self.filled = 0
        return found

    def state_dict(self) -> dict[str, Any]:
        """The buffered rows, and what was allocated for them, as plain values."""
        held = {k: t[: max(1, self.filled)].clone() for k, t in self.tables.items()}  # one row shows the layout of an empty one
        return {"capacity": self.capacity, "allocated": self._allocated(), "filled": self.filled, "tables": held}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Self:
        """The buffer whose ``state_dict`` this is: the same rows in memory of the same size and layout."""
        buffer = cls(state["capacity"])
        buffer.filled = state["filled"]
        buffer.tables = {k: _empty_like(t, state["allocated"]) for k, t in state["tables"].items()}
        for name, rows in state["tables"].items():
            buffer.tables[name][: len(rows)].copy_(rows)
        return buffer

    def _allocated(self) -> int:
        return len(next(iter(self.tables.values()))) if self.tables else self.capacity


def _empty_like(table: Tensor, rows: int) -> Tensor:
    """Uninitialised memory for more rows in the memory layout of the table, so units stay contiguous if they are."""
    if table.ndim > 2 and table.stride(-2) == 1:
        return table.new_empty(rows, *table.mT.shape[1:]).mT
    return torch.empty((rows, *table.shape[1:]), dtype=table.dtype, device=table.device)
