"""Cells of a grid of interventions: a prompt is repeated once per cell, and each repetition has a state of its own replaced."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nodelens.engine.driver import device_of
from nodelens.network.changed import Change
from nodelens.network.hooks import edit
from nodelens.network.layers import Layer

from .token_model import TokenModel

TOKENS = 4096  # that one pass holds at most
_LOGITS = 2**26  # logits that one pass holds at most
_SAME = 1e-4  # difference between two ways of running a cell, of the largest logit
_PASS = {"cpu": 128}  # tokens that take a block as long as starting it does, by the type of the device
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


class Way(NamedTuple):
    """What the cells of a pass share, and whether only the last token is computed behind the last attention."""

    shares: str
    cached: bool
    short: bool


WAYS = (Way("cache and blocks", True, True), Way("cache and blocks", True, False), Way("blocks", False, False))


class CellPasses:
    """Runs the cells of one prompt, many in one pass.

    ids (T,): the prompt. shared: tokens before the first written position and blocks before a cell run once per pass and not once
    per cell: the model's key-value cache holds these tokens, and the rows of cells join the batch at their own blocks. Behind the
    last attention only the last token counts. A model that does not take this, or gives other logits with it, runs whole for each
    cell; ``shares`` tells.
    """

    def __init__(self, model: TokenModel, ids: Tensor, shared: bool = True):
        self.model, self.ids = model, ids
        self._ways = list(WAYS) if shared else []
        self._cache: Any = None  # of the whole prompt

    @property
    def shares(self) -> str:
        """What the cells of a pass share: ``cache and blocks``, ``blocks``, or ``nothing``, when the whole model runs for each."""
        return self._ways[0].shares if self._ways else "nothing"

    def read(self, layers: Iterable[Layer]) -> tuple[dict[str, Tensor], Tensor]:
        """{layer: what passes there, (1, T, width)} and the last logits (1, V) of the prompt, whose cache the passes then use."""
        try:
            shown, logits, self._cache = self.model.read_and_cache(self.ids[None], layers)
        except _REFUSES:
            shown, logits = self.model.read(self.ids[None], layers, last=True)
        return shown, logits

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
                logits = self._joined(self._ways[0], cells)
                if self._is_right(cells, logits):
                    return logits
            except _REFUSES:
                pass
            self._ways.pop(0)
        return None

    def _is_right(self, cells: Sequence[GridCell], logits: Tensor) -> bool:
        """Whether the first and the last cell, and one without effect, have the logits of the whole model.

        Asked once for each way of sharing, with and without a cache, part of a block, with and without effect, and length of a
        prompt, on which masks and positions may depend.
        """
        cached = self._ways[0].cached and min(cell.position for cell in cells) > 0
        idle = [self._without_effect(cell) for cell in cells]
        asked = {(self._ways[0], cached, cell.part, each, len(self.ids)) for cell, each in zip(cells, idle, strict=True)}
        if asked <= self.model.compared:
            return True
        some = sorted({0, len(cells) - 1, idle.index(max(idle))})
        few, whole = logits[some], repeated_logits(self.model, self.ids, [cells[k] for k in some])
        if few.shape != whole.shape or not bool((few - whole).abs().max() <= _SAME * whole.abs().max()):
            return False
        self.model.compared |= asked
        return True

    def _joined(self, way: Way, cells: Sequence[GridCell]) -> Tensor:
        """Logits (cells, V) of cells in the order of their blocks.

        Row 0 is the prompt itself; the others join at the block they change.
        """
        skip = min(cell.position for cell in cells) if way.cached else 0
        later = [_later(cell, skip) for cell in cells]
        without = [way.short and self._without_effect(cell) for cell in cells]
        changed = [cell for cell, idle in zip(later, without, strict=True) if not idle]
        counts, outputs, inputs = _changes(self.model, changed, way.short)
        before = self._prefix(skip, counts) if skip else None
        with edit(outputs, inputs):
            logits = self.model.logits(self.ids[None, skip:], last=True, cache=before).float()
        if len(logits) != len(changed) + 1:
            raise ValueError(f"the model puts out {len(logits)} rows, and not {len(changed) + 1}")
        own = iter(range(1, len(logits)))
        return logits[[0 if idle else next(own) for idle in without]]

    def _without_effect(self, cell: GridCell) -> bool:
        """Whether a cell comes after the last attention, where tokens mix no more, and not at the last token."""
        return cell.block == len(self.model.roles.blocks) - 1 and cell.part != "input" and cell.position < len(self.ids) - 1

    def _prefix(self, skip: int, counts: Sequence[int]) -> Any:
        """The key-value cache of the first tokens, for each block with its number of rows."""
        if self._cache is None:
            self._cache = self.model.cache(self.ids[None])
        cache = _cropped(self._cache, len(self.ids) - skip)
        if cache is None:
            cache = self.model.cache(self.ids[None, :skip])
        for layer, count in zip(cache.layers, counts, strict=False):  # one more count than there are blocks
            layer.batch_repeat_interleave(count)
        return cache


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
    most = max(1, _LOGITS // _held(model, length))
    for first, near in _near(model, length, cells):
        size = max(1, min(TOKENS // (length - first), most))
        for start in range(0, len(near), size):
            yield sorted(near[start : start + size], key=lambda k: cells[k].start)


def _near(model: TokenModel, length: int, cells: Sequence[GridCell]) -> Iterator[tuple[int, list[int]]]:
    """The cells of each pass: (their first position, their indices in the order of positions).

    A pass computes all tokens from its first position on, in each row from its block on, and takes a while to start: the sum over
    passes is least.
    """
    blocks, at = len(model.roles.blocks), dict[int, list[int]]()
    for k in sorted(range(len(cells)), key=lambda k: (cells[k].position, cells[k].start)):
        at.setdefault(cells[k].position, []).append(k)
    positions = np.array([*at], dtype=np.int64)
    rows = np.cumsum([0] + [sum(blocks - cells[k].start for k in own) for own in at.values()])  # that blocks compute
    begin = blocks * _PASS.get(device_of(model.model).type, TOKENS)
    least, starts = np.zeros(len(at) + 1), np.zeros(len(at) + 1, dtype=np.int64)
    for end in range(1, len(at) + 1):
        costs = least[:end] + begin + (blocks + rows[end] - rows[:end]) * (length - positions[:end])
        starts[end], least[end] = costs.argmin(), costs.min()
    cuts, own = [len(at)], list(at.values())
    while cuts[-1]:
        cuts.append(int(starts[cuts[-1]]))
    for start, end in pairwise(reversed(cuts)):
        yield int(positions[start]), [k for each in own[start:end] for k in each]


def _later(cell: GridCell, skip: int) -> GridCell:
    """The cell in a pass without the first tokens."""
    return replace(cell, position=cell.position - skip) if skip else cell


def _changes(
    model: TokenModel, cells: Sequence[GridCell], short: bool
) -> tuple[list[int], dict[nn.Module, Change], dict[nn.Module, Change]]:
    """The rows of each block, and the changes of outputs and inputs with which cells join a pass."""
    rows, last = list(enumerate(cells, 1)), len(model.roles.blocks)
    batch, counts, outputs, inputs = 1, list[int](), dict[nn.Module, Change](), dict[nn.Module, Change]()
    inner = _by_layer([(row, cell) for row, cell in rows if cell.part not in _STREAM])
    if short:
        layer = model.part(last - 1, "mlp")
        inputs[layer.module] = _last_token
        inner |= {layer.name: [(row, replace(cell, position=-1)) for row, cell in inner.get(layer.name, ())]}
    for block in range(last + 1):
        own = [(row, cell) for row, cell in rows if cell.start == block]
        batch += len(own)
        if own:
            layer = model.part(min(block, last - 1), "input" if block < last else "output")
            join = _joining([(row, cell) for row, cell in own if cell.part in _STREAM], len(own), batch)
            (inputs if block < last else outputs)[layer.module] = join
        for each in inner.values():
            if each and each[0][1].start == block:
                layer = each[0][1].layer
                (inputs if layer.side == "input" else outputs)[layer.module] = writer(each, batch)
        counts.append(batch)
    return counts, outputs, inputs


def _last_token(stream: Tensor) -> Tensor:
    """What the last block's MLP reads, (B, T, d), at the last token; the stream after it is right there, and only there used."""
    return stream[:, -1:]


def _cropped(cache: Any, tokens: int) -> Any:
    """A cache without its last tokens, which shares its tensors; None for one that cannot be cropped, such as recurrent states."""
    if not getattr(cache, "is_croppable", False):
        return None
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    try:
        found.crop(-tokens)
    except RuntimeError:  # a sliding window has dropped tokens that were needed
        return None
    return found


def _joining(cells: Sequence[tuple[int, GridCell]], more: int, batch: int) -> Change:
    """A function that adds rows like the first to the stream (B, T, d), and writes the cells in theirs."""
    write = writer(cells, batch)

    def join(stream: Tensor) -> Tensor:
        if len(stream) + more != batch:
            raise ValueError(f"the residual stream has {len(stream)} rows, and not {batch - more}")
        return write(torch.cat([stream, stream[:1].expand(more, *stream.shape[1:])]))

    return join
