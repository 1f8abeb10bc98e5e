"""Cells of a grid of interventions: a prompt is repeated once per cell, and each repetition has a state of its own replaced."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.network.changed import Change
from nodelens.network.hooks import edit
from nodelens.network.layers import Layer

from .token_model import TokenModel

TOKENS = 4096  # that one pass holds at most
_LOGITS = 2**26  # logits that one pass holds at most
_SAME = 1e-4  # difference between two ways of running a cell, of the largest logit
_STREAM = ("input", "output")
_REFUSES = (RuntimeError, ValueError, IndexError, TypeError, AttributeError, NotImplementedError)  # of a model or a cache


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
        """The block that is the first to differ: the next one for the output of a block, otherwise the block itself."""
        return self.block + (self.part == "output")


class CellPasses:
    """Runs the cells of one prompt, many in one pass.

    ids (T,): the prompt. shared: tokens before the first written position and blocks before a cell run once per pass and not once
    per cell: the model's key-value cache holds these tokens, and the rows of cells join the batch at their own blocks. A model that
    does not take this, or gives other logits with it, runs whole for each cell; ``shares`` tells.
    """

    def __init__(self, model: TokenModel, ids: Tensor, shared: bool = True):
        self.model, self.ids = model, ids
        self._ways = [partial(_joined, cached=True), partial(_joined, cached=False)] if shared else []

    @property
    def shares(self) -> str:
        """What the cells of a pass share: ``cache and blocks``, ``blocks``, or ``nothing``, when the whole model runs for each."""
        return ("nothing", "blocks", "cache and blocks")[len(self._ways)]

    def __call__(self, cells: Sequence[GridCell]) -> Iterator[tuple[Sequence[int], Tensor]]:
        """The logits of the last position with each cell written: (indices of some of the cells, their logits (n, V)).

        A pass has at most 4,096 tokens and 2^26 logits. Hooks are gone after each pass. Run it inside ``TokenModel.running``.
        """
        for part in _parts(self.model, len(self.ids), cells):
            own = [cells[k] for k in part]
            logits = self._shared(own) if len(own) > 1 else None
            if logits is not None:
                yield part, logits
                continue
            size = max(1, min(TOKENS // len(self.ids), _LOGITS // _held(self.model, len(self.ids))))
            for start in range(0, len(own), size):
                yield part[start : start + size], repeated_logits(self.model, self.ids, own[start : start + size])

    def _shared(self, cells: Sequence[GridCell]) -> Tensor | None:
        """Logits (n, V) of cells in the order of their blocks; None if the model does not take what they share."""
        while self._ways:
            try:
                logits = self._ways[0](self.model, self.ids, cells)
                if self._is_right(cells, logits):
                    return logits
            except _REFUSES:
                pass
            self._ways.pop(0)
        return None

    def _is_right(self, cells: Sequence[GridCell], logits: Tensor) -> bool:
        """Whether the first and the last cell have the logits of the whole model.

        Asked once for each way of sharing, part of a block and length of a prompt, on which masks and positions may depend.
        """
        asked = {(len(self._ways), cell.part, len(self.ids)) for cell in cells}
        if asked <= self.model.compared:
            return True
        few, whole = logits[[0, -1]], repeated_logits(self.model, self.ids, [cells[0], cells[-1]])
        if few.shape != whole.shape or not bool((few - whole).abs().max() <= _SAME * whole.abs().max()):
            return False
        self.model.compared |= asked
        return True


def whole_passes(shared: Sequence[str]) -> list[str]:
    """A line that says so where the model ran whole for each cell; shared: what the passes of each prompt share."""
    whole = sum(each == "nothing" for each in shared)
    return (
        [f"the model ran whole for each cell of {whole} of {len(shared)} prompts: it does not take shared passes"] if whole else []
    )


def repeated_logits(model: TokenModel, ids: Tensor, cells: Sequence[GridCell]) -> Tensor:
    """Logits (cells, V) of the last position of the prompt, repeated once per cell, with each cell written in its row."""
    with written(list(enumerate(cells)), len(cells)):
        return model.logits(ids.expand(len(cells), -1), last=True).float()


def written(cells: Sequence[tuple[int, GridCell]], batch: int) -> AbstractContextManager[None]:
    """Inside, each cell is written in its row of a batch."""
    outputs: dict[nn.Module, Change] = {}
    inputs: dict[nn.Module, Change] = {}
    for own in _by_layer(cells).values():
        layer = own[0][1].layer
        (inputs if layer.side == "input" else outputs)[layer.module] = writer(own, batch)
    return edit(outputs, inputs)


def writer(cells: Sequence[tuple[int, GridCell]], batch: int) -> Change:
    """A function that writes cells into rows of a copy of a tensor, (B, T, width) or (B T, width), in the order given."""
    groups: dict[tuple[int, int] | None, list[tuple[int, GridCell]]] = {}
    for row, cell in cells:
        groups.setdefault(cell.columns, []).append((row, cell))

    def write(tensor: Tensor) -> Tensor:
        new = tensor.clone()
        by_row = new.view(batch, -1, new.shape[-1])
        for columns, own in groups.items():
            rows = torch.tensor([row for row, _ in own], device=new.device)
            positions = torch.tensor([cell.position for _, cell in own], device=new.device)
            values = torch.stack([cell.value for _, cell in own]).to(new)
            by_row[rows, positions, slice(None) if columns is None else slice(*columns)] = values
        return new

    return write


def _by_layer(cells: Sequence[tuple[int, GridCell]]) -> dict[str, list[tuple[int, GridCell]]]:
    found: dict[str, list[tuple[int, GridCell]]] = {}
    for row, cell in cells:
        found.setdefault(cell.layer.name, []).append((row, cell))
    return found


def _held(model: TokenModel, length: int) -> int:
    """Logits that a row of a pass holds."""
    head = getattr(model.roles.single.get("head"), "module", None)
    vocabulary = len(weight) if isinstance(weight := getattr(head, "weight", None), Tensor) else 2**15
    return vocabulary if model.keeps_last else vocabulary * length


def _parts(model: TokenModel, length: int, cells: Sequence[GridCell]) -> Iterator[list[int]]:
    """Indices of the cells that share a pass: those of near positions, the earlier blocks first."""
    order = sorted(range(len(cells)), key=lambda k: (cells[k].position, cells[k].start))
    rows = max(1, _LOGITS // _held(model, length))
    while order:
        size = max(1, min(TOKENS // (length - cells[order[0]].position), rows))
        yield sorted(order[:size], key=lambda k: cells[k].start)
        order = order[size:]


def _joined(model: TokenModel, ids: Tensor, cells: Sequence[GridCell], cached: bool) -> Tensor:
    """Logits (cells, V) of cells in the order of their blocks. Row 0 is the prompt itself; others join at the block they change."""
    skip = min(cell.position for cell in cells) if cached else 0
    rows = [(row, replace(cell, position=cell.position - skip)) for row, cell in enumerate(cells, 1)]
    last, counts, outputs, inputs = len(model.roles.blocks), [1], dict[nn.Module, Change](), dict[nn.Module, Change]()
    inner = _by_layer([(row, cell) for row, cell in rows if cell.part not in _STREAM])
    for block in range(last + 1):
        own = [(row, cell) for row, cell in rows if cell.start == block]
        batch = counts[-1] + len(own)
        if own:
            layer = model.part(min(block, last - 1), "input" if block < last else "output")
            join = _joining([(row, cell) for row, cell in own if cell.part in _STREAM], len(own), batch)
            (inputs if block < last else outputs)[layer.module] = join
        for each in inner.values():
            if each[0][1].start == block:
                layer = each[0][1].layer
                (inputs if layer.side == "input" else outputs)[layer.module] = writer(each, batch)
        counts.append(batch)
    before = _cache(model, ids[:skip], counts[1:]) if skip else None
    with edit(outputs, inputs):
        logits = model.logits(ids[None, skip:], last=True, cache=before).float()
    if len(logits) != len(cells) + 1:
        raise ValueError(f"the model puts out {len(logits)} rows, and not {len(cells) + 1}")
    return logits[1:]


def _cache(model: TokenModel, ids: Tensor, counts: Sequence[int]) -> Any:
    """The key-value cache of the first tokens, for each block with its number of rows."""
    cache = model.cache(ids[None])
    for layer, count in zip(cache.layers, counts, strict=False):  # one more count than there are blocks
        layer.batch_repeat_interleave(count)
    return cache


def _joining(cells: Sequence[tuple[int, GridCell]], more: int, batch: int) -> Change:
    """A function that adds rows like the first to the stream (B, T, d), and writes the cells in theirs."""
    write = writer(cells, batch)

    def join(stream: Tensor) -> Tensor:
        if len(stream) + more != batch:
            raise ValueError(f"the residual stream has {len(stream)} rows, and not {batch - more}")
        return write(torch.cat([stream, stream[:1].expand(more, *stream.shape[1:])]))

    return join
