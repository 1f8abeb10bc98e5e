"""Rows of a shared pass: the prompt, and for each cell a copy of it that joins where the residual stream begins to differ."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nodelens.network.changed import Change

from .grid_cell import GridCell, by_layer, places, writer
from .token_model import TokenModel


@dataclass(frozen=True, eq=False)
class JoiningRows:
    """The number of rows of each block of a pass, and the changes of what modules put out and read.

    Row 0 is the prompt itself, and row k + 1 the copy of cell k. Behind the attention of a block, tokens mix no more within that
    block. Cells inside a block are therefore written in a few extra rows, at most one per position in each, and the copies join
    behind the block, with the state that the extra row has at the cell's position.
    """

    counts: list[int] = field(default_factory=list)
    outputs: dict[nn.Module, Change] = field(default_factory=dict)
    inputs: dict[nn.Module, Change] = field(default_factory=dict)

    @classmethod
    def of(cls, model: TokenModel, cells: Sequence[GridCell], skip: int, short: bool) -> "JoiningRows":
        """For cells in the order of their starts.

        skip: the number of tokens that a cache holds. short: whether only the last token is computed behind the last attention.
        """
        found, rows, last = cls(), _rows(cells), len(model.roles.blocks)
        kept = before = 0
        if short:
            found.inputs[model.part(last - 1, "mlp").module] = _last_token
        for block in range(last + 1):
            own = [row for row in rows if row.cell.start == block]
            inside = [row for row in rows if row.cell.inside and row.cell.block == block]
            more = max((row.extra + 1 for row in inside), default=0)
            if own or before or more:
                layer = model.part(min(block, last - 1), "input" if block < last else "output")
                join = _joining(own, kept + 1, before, more, skip)
                (found.inputs if block < last else found.outputs)[layer.module] = join
            kept, before = kept + len(own), more
            found.counts.append(kept + 1 + more)
            found._write(inside, kept + 1, more, skip, model.part(last - 1, "mlp").name if short and inside else "")
        return found

    def _write(self, inside: Sequence["_Row"], first: int, more: int, skip: int, short: str) -> None:
        """Adds the changes inside a block, in its extra rows, the first of which is ``first``."""
        for name, own in by_layer([(first + row.extra, row.cell) for row in inside]).items():
            layer = own[0][1].layer
            if name == short:  # it puts out the last token alone
                own = [(row, replace(cell, position=skip)) for row, cell in own]
            (self.inputs if layer.side == "input" else self.outputs)[layer.module] = writer(own, first + more, skip)


class _Row(NamedTuple):
    """The row of a cell's copy, and, for one inside a block, which of the extra rows it is written in."""

    row: int
    cell: GridCell
    extra: int


def _rows(cells: Sequence[GridCell]) -> list[_Row]:
    at: Counter[tuple[int, int]] = Counter()
    rows = []
    for row, cell in enumerate(cells, 1):
        rows.append(_Row(row, cell, at[cell.block, cell.position]))
        at[cell.block, cell.position] += cell.inside
    return rows


def _joining(own: Sequence[_Row], kept: int, before: int, more: int, skip: int) -> Change:
    """A function that takes the ``before`` extra rows behind the ``kept`` ones from the stream (B, T, d), and adds others.

    The rows of cells follow, like the first one but for their states, and then ``more`` extra rows, all like the first one.
    """

    def join(stream: Tensor) -> Tensor:
        if len(stream) != kept + before:
            raise ValueError(f"the residual stream has {len(stream)} rows, and not {kept + before}")
        new = torch.cat([stream[:kept], stream[:1].expand(len(own) + more, *stream.shape[1:])])
        given = [(row.row, row.cell) for row in own if not row.cell.inside]
        if given:
            new[places(given, skip, new.device)] = torch.stack([cell.value for _, cell in given]).to(new)
        made = [row for row in own if row.cell.inside]
        if made:
            rows, positions = places([(row.row, row.cell) for row in made], skip, new.device)
            extra = torch.tensor([kept + row.extra for row in made], device=new.device)
            new[rows, positions] = stream[extra, positions]
        return new

    return join


def _last_token(stream: Tensor) -> Tensor:
    """What the last block's MLP reads, (B, T, d), at the last token; the stream after it is right there, and only there used."""
    return stream[:, -1:].contiguous()
