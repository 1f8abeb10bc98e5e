"""Cells of a grid of interventions: a prompt is repeated once per cell, and each repetition has a state of its own replaced."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nodelens.engine.driver import device_of
from nodelens.network.hooks import edit
from nodelens.network.layers import Layer

from .grid_cell import GridCell, written
from .joining import JoiningRows
from .token_model import TokenModel

TOKENS = 4096  # that one pass holds at most
_LOGITS = 2**26  # logits that one pass holds at most
_SAME = 1e-4  # difference between two ways of running a cell, of the largest logit
_PASS = {"cpu": 128}  # tokens that take a block as long as starting it does, by the type of the device
_REFUSES = (RuntimeError, ValueError, LookupError, TypeError, AttributeError)  # of a model or a cache


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

    def __init__(self, model: TokenModel, ids: Tensor, shared: bool = True, cache: Any = None):
        self.model, self.ids = model, ids
        self._ways = list(WAYS) if shared else []
        self._cache = cache  # of the whole prompt
        self._whole: dict[GridCell, Tensor] = {}  # logits (V,) of the whole model for cells by which passes are compared

    @property
    def shares(self) -> str:
        """What the cells of a pass share: ``cache and blocks``, ``blocks``, or ``nothing``, when the whole model runs for each."""
        return self._ways[0].shares if self._ways else "nothing"

    @classmethod
    def read(
        cls, model: TokenModel, prompts: Tensor, layers: Iterable[Layer], row: int
    ) -> tuple[dict[str, Tensor], Tensor, "CellPasses"]:
        """Runs prompts (n, T): {layer: what passes there, (n, T, width)}, the last logits (n, V), and passes of one of them.

        The passes use the cache of this run.
        """
        layers = list(layers)
        try:
            shown, logits, cache = model.read_and_cache(prompts, layers)
        except _REFUSES:
            shown, logits, cache = *model.read(prompts, layers, last=True), None
        return shown, logits, cls(model, prompts[row], cache=_row(cache, row))

    def __call__(self, cells: Sequence[GridCell]) -> Iterator[tuple[Sequence[int], Tensor]]:
        """The logits of the last position with each cell written: (indices of some of the cells, their logits (n, V)).

        A pass has at most 4,096 tokens and 2^26 logits. Hooks are gone after each pass. Run it inside ``TokenModel.running``.
        """
        passes = [(part, [cells[k] for k in part]) for part in _parts(self.model, len(self.ids), cells)]
        self._compare([own for _, own in passes if len(own) > 1])
        for part, own in passes:
            logits = self._shared(own) if len(own) > 1 else None
            if logits is not None:
                yield part, logits
                continue
            for some, logits in self._repeated(own):
                yield [part[k] for k in some], logits

    def _repeated(self, cells: Sequence[GridCell]) -> Iterator[tuple[range, Tensor]]:
        """Indices and logits (n, V) of cells, for each of which the whole model runs."""
        size = max(1, min(TOKENS // len(self.ids), _LOGITS // _held(self.model, len(self.ids))))
        for start in range(0, len(cells), size):
            some = range(start, min(start + size, len(cells)))
            yield some, repeated_logits(self.model, self.ids, [cells[k] for k in some])

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

    def _compare(self, passes: Sequence[Sequence[GridCell]]) -> None:
        """Runs the whole model for the cells by which passes are compared, together: a small model takes long to start a pass."""
        kinds: dict[tuple[Any, ...], tuple[GridCell, ...]] = {}
        for own in passes if self._ways else ():
            kinds = self._new_kinds(own) | kinds
        try:
            self._run_whole(kinds)
        except _REFUSES:
            self._ways.clear()

    def _run_whole(self, kinds: Mapping[tuple[Any, ...], Sequence[GridCell]]) -> list[GridCell]:
        """Runs the whole model for cells of kinds, where it has not yet, and returns them."""
        cells = list(dict.fromkeys(cell for own in kinds.values() for cell in own))
        new = [cell for cell in cells if cell not in self._whole]
        for some, logits in self._repeated(new):
            self._whole |= {new[k]: row for k, row in zip(some, logits, strict=True)}
        return cells

    def _is_right(self, cells: Sequence[GridCell], logits: Tensor) -> bool:
        """Whether the first and the last cell of each kind that was not compared yet have the logits of the whole model."""
        kinds = self._new_kinds(cells)
        if not kinds:
            return True
        some, at = self._run_whole(kinds), {cell: k for k, cell in enumerate(cells)}
        few, whole = logits[[at[cell] for cell in some]], torch.stack([self._whole[cell] for cell in some])
        if few.shape != whole.shape or not bool((few - whole).abs().max() <= _SAME * whole.abs().max()):
            return False
        self.model.compared |= set(kinds)
        return True

    def _new_kinds(self, cells: Sequence[GridCell]) -> dict[tuple[Any, ...], tuple[GridCell, ...]]:
        """The first and the last cell of a pass of each kind that was not compared with the whole model yet.

        A kind is a way of sharing, with and without a cache, a part of a block, and a length of a prompt, on which masks and
        positions may depend. Cells without effect have the logits of the prompt itself: one of each part is enough.
        """
        cached, kinds = self._ways[0].cached and min(cell.position for cell in cells) > 0, dict[tuple[Any, ...], list[GridCell]]()
        for cell in cells:
            case = "without effect" if self._without_effect(cell) else cached
            kinds.setdefault((self._ways[0], case, cell.part, len(self.ids)), []).append(cell)
        new = {kind: own for kind, own in kinds.items() if kind not in self.model.compared}
        return {kind: (own[-1],) if kind[1] == "without effect" else (own[0], own[-1]) for kind, own in new.items()}

    def _joined(self, way: Way, cells: Sequence[GridCell]) -> Tensor:
        """Logits (cells, V) of cells in the order of their starts. Row 0 is the prompt itself; cells without effect are like it."""
        skip = min(cell.position for cell in cells) if way.cached else 0
        without = [way.short and self._without_effect(cell) for cell in cells]
        changed = [cell for cell, idle in zip(cells, without, strict=True) if not idle]
        rows = JoiningRows.of(self.model, changed, skip, way.short)
        before = self._prefix(skip, rows.counts) if skip else None
        with edit(rows.outputs, rows.inputs):
            logits = self.model.logits(self.ids[None, skip:], last=True, cache=before).float()
        if len(logits) != len(changed) + 1:
            raise ValueError(f"the model puts out {len(logits)} rows, and not {len(changed) + 1}")
        own = iter(range(1, len(logits)))
        return logits[[0 if idle else next(own) for idle in without]]

    def _without_effect(self, cell: GridCell) -> bool:
        """Whether a cell comes after the last attention, where tokens mix no more, and not at the last token."""
        return cell.start == len(self.model.roles.blocks) and cell.position < len(self.ids) - 1

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


def _row(cache: Any, row: int) -> Any:
    """The cache of one row of a batch; the cache as it is, if it cannot be cropped and is not used; None for one without rows."""
    if not getattr(cache, "is_croppable", False):
        return cache
    try:
        found = _copied(cache)
        found.batch_select_indices(torch.tensor([row]))
    except _REFUSES:  # a layer with another state, or caches in a cache
        return None
    return found


def _cropped(cache: Any, tokens: int) -> Any:
    """A cache without its last tokens, which shares its tensors; None for one that cannot be cropped, such as recurrent states."""
    if not getattr(cache, "is_croppable", False):
        return None
    found = _copied(cache)
    try:
        found.crop(-tokens)
    except RuntimeError:  # a sliding window has dropped tokens that were needed
        return None
    return found


def _copied(cache: Any) -> Any:
    """A cache with layers of its own, which share their tensors."""
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    return found
