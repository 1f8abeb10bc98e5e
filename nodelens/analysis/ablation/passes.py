"""Passes under lesions: of the whole model, and from a site on for several lesions at once."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.interventions.replay import Function, RecordedCall, Recording, channels_last, tiled
from nodelens.network.batch import Batch
from nodelens.network.objective import Objective

from .folding import Folds
from .lesions import Lesion, removed, without_columns
from .losses import loss_by_sample
from .replacement import Replacement

_NONE = Lesion({}, {})
_FAILS = (RuntimeError, ValueError, LookupError, TypeError, AttributeError)  # of a model of which only a part runs


@dataclass(frozen=True, eq=False)
class LesionSite:
    """Where a lesion begins: what a call reads (side input), or what it returns."""

    call: RecordedCall
    side: str

    @property
    def time(self) -> int:
        """Of the recording: calls that returned up to it do not depend on the lesion."""
        return self.call.start if self.side == "input" else self.call.end


@dataclass(frozen=True, eq=False)
class Base:
    """A batch, its pass through the whole model, and its losses: dense and counts (B,), summed loss and number of predictions."""

    model: nn.Module
    objective: Objective
    values: Replacement
    batch: Batch
    recording: Recording
    dense: Tensor
    counts: Tensor

    def whole(self, lesion: Lesion) -> Tensor:
        """The losses when the whole model runs under a lesion, (B,)."""
        with removed(self.model, [lesion], self.values):
            return loss_by_sample(self.objective, self.objective.run(self.model, self.batch), self.batch)[0]


@dataclass(eq=False)
class Replay:
    """The losses under lesions from passes that begin at a site.

    short: whether batch norms are folded into convolutions, and outputs that nothing should read any more come once and not once
    for each copy, so that reading them is an error. last: whether maps lie channels last, which convolutions on a CPU read faster;
    a view that joins channels and positions is an error then.
    """

    base: Base
    site: LesionSite
    folds: Folds
    short: bool = True
    last: bool = False
    tiles: dict[int, dict[RecordedCall, Any]] = field(default_factory=dict, init=False)
    several: dict[int, Batch] = field(default_factory=dict, init=False)

    @cached_property
    def skipped(self) -> list[RecordedCall]:
        return self.base.recording.before(self.site.time)

    @cached_property
    def once(self) -> bool:
        """Whether the site's module is called once, so that no later call needs an edit of its own."""
        return sum(call.module is self.site.call.module for call in self.base.recording.calls) == 1

    @cached_property
    def pairs(self) -> dict[RecordedCall, RecordedCall]:
        """Convolutions that run, with the batch norm behind them; the site's own too, where it is a convolution."""
        own = self.site.call if self.site.side == "input" else None
        found = self.folds.pairs(self.base.recording.calls) if self.short else {}
        return {a: b for a, b in found.items() if b.known and (a is own or a.start > self.site.time)}

    @cached_property
    def unread(self) -> set[RecordedCall]:
        """Skipped calls with a later one beside them, outside of the module that holds the site."""
        last = {call.parent: call for call in self.skipped}
        return {call for call in self.skipped if call.parent is not self.site.call.parent and call is not last[call.parent]}

    def __call__(self, lesions: Sequence[Lesion]) -> Tensor:
        """One pass for all lesions, which have the same places, (lesions, B); without a lesion, (1, B)."""
        base, copies = self.base, max(1, len(lesions))
        tiles, batch = self._tiled(len(lesions)), base.batch
        several = batch if copies == 1 else self.several[copies]
        edited, own = self._own(lesions, tiles)
        outputs = {call: tiles[call] for call in self.skipped}
        with base.recording.replayed(outputs, own), removed(base.model, edited or [_NONE], base.values):
            return loss_by_sample(base.objective, base.objective.run(base.model, several), several)[0].reshape(copies, -1)

    def shared_or_alone(self, lesions: Sequence[Lesion]) -> Tensor:
        """The losses under lesions, (lesions, B), in one pass or, where copies of this batch cannot share it, in one each."""
        try:
            return self(lesions)
        except _FAILS:  # shapes that do not match: a tensor without one row per sample, as of the tokens that a router chose
            if self.last:  # or a view of maps that were a single position in the first batch
                return replace(self, last=False).shared_or_alone(lesions)
            if len(lesions) == 1:
                raise
            return torch.cat([self([lesion]) for lesion in lesions])

    def idle(self, lesion: Lesion) -> bool:
        """Whether a lesion changes nothing that its only reader reads, as where a ReLU is zero for every sample."""
        key, call = (self.site.call.module, "input"), self.site.call
        if call.read is None or lesion.weights or [*lesion.places] != [key] or not self.once:
            return False
        places, dim = lesion.places[key].to(call.read.device), lesion.dims[key]
        return torch.equal(self.base.values.new(call.read, key, dim, places), call.read.index_select(dim, places))

    def agrees(self, lesions: Sequence[Lesion]) -> bool:
        """Whether a pass without a lesion gives the same bits, and one with lesions what the whole model gives, up to rounding."""
        base = self.base
        try:
            if not torch.equal(self([]), base.dense[None]):
                return False
            found = self(lesions)
        except _FAILS:  # the whole model runs instead, and raises what is wrong with it
            return False
        slack = 1e-5 * (base.counts + base.dense.abs())
        ends = {0, len(lesions) - 1}
        return all(bool(((found[k] - base.whole(lesions[k])).abs() <= slack).all()) for k in ends)

    def _own(self, lesions: Sequence[Lesion], tiles: dict[RecordedCall, Any]) -> tuple[list[Lesion], dict[RecordedCall, Function]]:
        """The lesions that hooks have to make, and what calls compute instead of their modules."""
        if not lesions:
            return [], {}
        call, pairs = self.site.call, dict(self.pairs)
        norm = pairs.pop(call, None)
        own = self.folds.functions(pairs, self.last)
        if self.site.side == "output" or call not in tiles:
            return list(lesions), own
        weight = None if norm is None else self.folds.of(call, norm, self.last)[0]
        without = without_columns(lesions, call.module, tiles[call if norm is None else norm], self.base.values, weight)
        if without is None:
            return list(lesions), own
        return [lesion.without(call.module) for lesion in lesions], own | self.folds.passing(norm) | {call: without}

    def _tiled(self, lesions: int) -> dict[RecordedCall, Any]:
        """What the skipped calls, the site's, and the norm behind it returned, once for each lesion; without one, as recorded."""
        if lesions not in self.tiles:
            samples, site, copies = len(self.base.batch), self.site.call, max(1, lesions)
            more = [site, *([self.pairs[site]] if site in self.pairs else [])] if self.once and site.known else []
            once = self.unread if self.short else set()
            found = {call: call.output if call in once else tiled(call.output, copies, samples) for call in [*self.skipped, *more]}
            if self.last and lesions:
                found |= {call: channels_last(output) for call, output in found.items() if call not in once}
            self.tiles = {lesions: found}
            self.several = {copies: self.base.batch.map(lambda t: t.repeat(copies, *[1] * (t.ndim - 1)))}
        return self.tiles[lesions]
