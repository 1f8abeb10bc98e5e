"""A cell of a grid of interventions, and the functions that write cells into the rows of a batch."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nodelens.network.changed import Change
from nodelens.network.hooks import edit
from nodelens.network.layers import Layer


@dataclass(frozen=True, eq=False)
class GridCell:
    """A state that is written at one position: ``value`` (width,), or (end - start,) where ``columns`` names a part of it.

    layer: whose input or output is replaced; block, part: which part of which block it is, as in ``Roles``
    """

    layer: Layer
    block: int
    part: str
    position: int
    value: Tensor
    columns: tuple[int, int] | None = None

    @property
    def start(self) -> int:
        """The first block that reads another residual stream: the next one, but for a cell of a block's input."""
        return self.block + (self.part != "input")

    @property
    def inside(self) -> bool:
        """Whether the cell is inside its block, as an attention, an MLP or a head is, and not in the residual stream."""
        return self.part not in ("input", "output")


def written(cells: Sequence[tuple[int, GridCell]], batch: int) -> AbstractContextManager[None]:
    """Inside, each cell is written in its row of a batch."""
    outputs: dict[nn.Module, Change] = {}
    inputs: dict[nn.Module, Change] = {}
    for own in by_layer(cells).values():
        layer = own[0][1].layer
        (inputs if layer.side == "input" else outputs)[layer.module] = writer(own, batch)
    return edit(outputs, inputs)


def writer(cells: Sequence[tuple[int, GridCell]], batch: int, skip: int = 0) -> Change:
    """A function that writes cells into rows of a copy of a tensor, (B, T, width) or (B T, width), in the order given.

    skip: the number of tokens of the prompt that come before those of the tensor
    """
    groups: dict[tuple[int, int] | None, list[tuple[int, GridCell]]] = {}
    for row, cell in cells:
        groups.setdefault(cell.columns, []).append((row, cell))

    def write(tensor: Tensor) -> Tensor:
        new = tensor.clone()
        by_row = new.view(batch, -1, new.shape[-1])
        for columns, own in groups.items():
            rows, positions = places(own, skip, new.device)
            values = torch.stack([cell.value for _, cell in own]).to(new)
            by_row[rows, positions, slice(None) if columns is None else slice(*columns)] = values
        return new

    return write


def places(cells: Sequence[tuple[int, GridCell]], skip: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows and the positions of cells, (n,) each, in a batch without the first ``skip`` tokens."""
    rows, positions = zip(*((row, cell.position - skip) for row, cell in cells), strict=True)
    return torch.tensor(rows, device=device), torch.tensor(positions, device=device)


def by_layer(cells: Sequence[tuple[int, GridCell]]) -> dict[str, list[tuple[int, GridCell]]]:
    """The cells of each layer, by its name."""
    found: dict[str, list[tuple[int, GridCell]]] = {}
    for row, cell in cells:
        found.setdefault(cell.layer.name, []).append((row, cell))
    return found
