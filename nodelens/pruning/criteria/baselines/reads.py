"""Criteria of what consumers read of a unit: means and spreads of one forward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from nodelens.network.experts import Call
from nodelens.network.groups import GroupSlice, PruningGroup
from nodelens.statistics import Accumulator, Moments
from nodelens.statistics.processes import reduce_sums, reduce_tensor, world
from nodelens.statistics.rows import Rows

from .base import Baseline, Found, added
from .passes import Need, Sums, consumers, counted

Place = tuple[str, int | None]  # where units are read: a module, and which of its experts


class _OfConsumers(Sums):
    """What passes at the consumers.

    The units of an expert are read times its router's weight, w u, which is 0 for a token that goes elsewhere: a mixture is one
    wide FFN of all experts' units. A row is any token that is not padded; those that go elsewhere are counted, not formed.
    """

    reads: ClassVar = True

    def __init__(self, model: nn.Module, groups: Sequence[PruningGroup]):
        super().__init__(model, groups)
        self.slices = consumers(groups)
        self.paths = list(dict.fromkeys(piece.module for piece in self.slices if piece.entry is None))
        self.mixtures = list(dict.fromkeys(piece.module for piece in self.slices if piece.entry is not None))

    def called(self, path: str, call: Call) -> None:
        counts = counted(call, self.batch)
        for expert in dict.fromkeys(piece.entry for piece in self.slices if piece.module == path):
            assert expert is not None
            share = call.share(expert).only(counts.flatten())
            x = call.hidden(expert, share).double() * share.weights.double()
            self.see_routed((path, expert), x, share.tokens, counts)

    def see_routed(self, place: Place, x: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """Takes w u of an expert (r, units) float64 at tokens (r,) of those that count, (samples, positions) bool."""


def place_of(piece: GroupSlice) -> Place:
    """Where a consumer's units are read."""
    return piece.module, piece.entry


class ReadSums(_OfConsumers):
    """Moments of each consumer's input, a row a position."""

    def __init__(self, model: nn.Module, groups: Sequence[PruningGroup]):
        super().__init__(model, groups)
        self.moments = {place_of(piece): Accumulator(Moments) for piece in self.slices}
        self.shifts: dict[Place, Tensor] = {}

    def see(self, path: str, rows: Rows) -> None:
        rows, place = rows.double(), (path, None)
        shift = self.shifts.setdefault(place, rows.mean)
        self.moments[place].add_rows(rows.about(shift))

    def see_routed(self, place: Place, x: Tensor, tokens: Tensor, counts: Tensor) -> None:
        finite = x.isfinite().all(1)
        x = x.where(finite[:, None], 0)
        zero = self.shifts.setdefault(place, x.new_zeros(x.shape[1]))  # about which those that go elsewhere add nothing
        n = (counts.sum() - (~finite).sum()).reshape(1)
        self.moments[place].add(Moments(n, zero, x.sum(0), x.square().sum(0)))

    def reduce(self) -> None:
        reduce_sums(self.moments, self.device)


class PositionSums(_OfConsumers):
    """Squares of what a unit shows each consumer, summed over its places and all samples, at each position.

    totals {piece: (units, positions)}; rows {piece: (positions,)}, how many samples have a token there. A position is the number of
    counted tokens before it, so that padding on either side moves none.
    """

    def __init__(self, model: nn.Module, groups: Sequence[PruningGroup]):
        super().__init__(model, groups)
        self.totals = {piece: self.zeros(len(piece.places), 0) for piece in self.slices}
        self.rows = {piece: self.zeros(0) for piece in self.slices}

    def see(self, path: str, rows: Rows) -> None:
        keep = rows.mask()
        place = (keep.cumsum(1) - 1).clamp_min(0)  # (samples, positions)
        for piece in self.slices:
            if piece.module == path:
                power = rows.x.double().square()[:, piece.places.to(rows.raw.device)].sum(2)  # (samples, units, positions)
                moved = torch.zeros_like(power).scatter_add_(2, place[:, None].expand_as(power), power).sum(0)
                count = torch.zeros_like(place).scatter_add_(1, place, keep.long()).sum(0).double()
                self.totals[piece] = _longer(self.totals[piece], moved)
                self.rows[piece] = _longer(self.rows[piece], count)

    def see_routed(self, place: Place, x: Tensor, tokens: Tensor, counts: Tensor) -> None:
        at = (counts.cumsum(1) - 1).clamp_min(0).flatten()  # (tokens,)
        count = torch.zeros_like(at).index_add_(0, at, counts.flatten().long())[: counts.shape[1]].double()
        for piece in self.slices:
            if place_of(piece) == place:
                power = x.where(x.isfinite(), 0).square()[:, piece.places.to(x.device)].sum(2).T  # (units, tokens of this expert)
                moved = power.new_zeros(len(power), counts.shape[1]).index_add_(1, at[tokens], power)
                self.totals[piece] = _longer(self.totals[piece], moved)
                self.rows[piece] = _longer(self.rows[piece], count)

    def reduce(self) -> None:
        for piece in self.slices:
            lengths = torch.zeros(world()[1], dtype=torch.long, device=self.device)
            lengths[world()[0]] = self.rows[piece].shape[-1]
            longest = int(reduce_tensor(lengths).max())
            self.totals[piece] = reduce_tensor(_longer(self.totals[piece], self.zeros(len(piece.places), longest)))
            self.rows[piece] = reduce_tensor(_longer(self.rows[piece], self.zeros(longest)))


def _longer(a: Tensor, b: Tensor) -> Tensor:
    """The sum of two tensors, the one of fewer positions filled up with zeros."""
    wide = max(a.shape[-1], b.shape[-1])
    a, b = (nn.functional.pad(t, (0, wide - t.shape[-1])) for t in (a, b))
    return a + b.to(a.device)


class _OfReads(Baseline):
    """What criteria of moments share."""

    needs: ClassVar = "reads"

    def sums(self) -> tuple[Need, ...]:
        return (Need(ReadSums),)


def _at_places(group: PruningGroup, found: Found, value: Callable[[Moments, GroupSlice], Tensor]) -> list[Tensor]:
    """A value a place of a consumer's input, at the places of each unit: (units, places) a consumer."""
    moments = found.sums[Need(ReadSums)].moments
    values = ((piece, value(moments[place_of(piece)].value, piece)) for piece in group.by_role("consumer"))
    return [each[piece.places.to(each.device)] for piece, each in values]


def kernels(model: nn.Module, piece: GroupSlice) -> Tensor:
    """What reads each place of a consumer's input, (places, outputs, kernel) float64; outputs are those of the place's group."""
    module, weight = model.get_submodule(piece.module), piece.of(model).double()
    if isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
        by_group = weight.unflatten(0, (module.groups, -1)).transpose(1, 2)  # (groups, inputs of one, outputs of one, ...)
        return by_group.flatten(0, 1).flatten(2)
    moved = weight.movedim(piece.dim - (piece.entry is not None), 0)
    return moved.reshape(*moved.shape[:2], -1)


@dataclass(frozen=True)
class Wanda(_OfReads):
    """Size of the weights that read a unit times the size of what they read: the structured form, called Wanda-sp.

    Published Wanda compares single weights within each output; this is FLAP's form for whole units. The norm is over all rows
    (positions of all samples) and not divided by their number: it grows with the data's square root, the order does not change.

    Formula: sum over u's places of mean_i |K_iu| ||x_u||_2, kernels summed; over consumers their sum
    Shapes: x over rows of what consumers read -> (units,)
    Unit:   that of weights times x, >= 0
    NaN:    never
    Source: Sun et al. 2024, 2306.11695, eq. 1; An et al. 2024, 2312.11983, section 5 (Wanda-sp)
    """

    names: ClassVar = ("wanda",)

    def __call__(self, group: PruningGroup, found: Found) -> Tensor:
        def value(x: Moments, piece: GroupSlice) -> Tensor:
            norm = (x.n * x.mean_square.clamp_min(0)).sqrt()
            return kernels(found.model, piece).abs().sum(2).mean(1) * norm

        return added(each.sum(1) for each in _at_places(group, found, value))


@dataclass(frozen=True)
class Flap(_OfReads):
    """Spread of a unit times the squared weights that read it: what is lost when its mean stays, as a bias.

    A large mean costs nothing here: use it with that bias. The paper compares layers by z-scores within each.

    Formula: mean over u's places of Var(x_u) ||K(u)||_2^2; over consumers their sum; Var unbiased, over all rows
    Shapes: x over rows of what consumers read -> (units,)
    Unit:   that of weights times x, squared, >= 0
    NaN:    fewer than two rows
    Source: An et al. 2024, 2312.11983, eqs. 5 and 6
    """

    names: ClassVar = ("flap",)

    def __call__(self, group: PruningGroup, found: Found) -> Tensor:
        def value(x: Moments, piece: GroupSlice) -> Tensor:
            return x.variance * kernels(found.model, piece).square().sum((1, 2))

        return added(each.mean(1) for each in _at_places(group, found, value))


@dataclass(frozen=True)
class ActivationPower(_OfReads):
    """Mean square of a unit: the control for every score that reads a loss.

    Formula: E x_u^2 over all rows, summed over u's places; over consumers their mean
    Shapes: x over rows of what consumers read -> (units,)
    Unit:   that of x squared, >= 0
    NaN:    no rows
    Source: 2604.23475
    """

    names: ClassVar = ("activation_power",)

    def __call__(self, group: PruningGroup, found: Found) -> Tensor:
        parts = _at_places(group, found, lambda x, piece: x.mean_square.clamp_min(0))
        return added(each.sum(1) for each in parts) / len(parts)


@dataclass(frozen=True)
class Minitron(Baseline):
    """Size of a unit over samples, averaged over positions; of a head that of its whole output.

    The paper takes the L2 norm over each batch; here it is over all samples, so that the batch size does not matter: the value
    grows with their number's square root, the order does not. It keeps (units, positions) float64 a consumer.

    Formula: mean_t sqrt(sum_n ||x_u(n, t)||_2^2), the inner norm over u's places; t the positions that some sample has; over
             consumers their sum
    Shapes: x (samples, places, positions) of what consumers read -> (units,)
    Unit:   that of x, >= 0
    NaN:    no rows
    Source: Muralidharan et al. 2024, 2407.14679, section 2.2 (L2 over the batch, mean over the sequence)
    """

    names: ClassVar = ("minitron",)
    needs: ClassVar = "reads"

    def sums(self) -> tuple[Need, ...]:
        return (Need(PositionSums),)

    def __call__(self, group: PruningGroup, found: Found) -> Tensor:
        power = found.sums[Need(PositionSums)]
        slices = group.by_role("consumer")
        return added(power.totals[piece][:, power.rows[piece] > 0].sqrt().mean(1) for piece in slices)


BASELINES: tuple[type[Baseline], ...] = (Wanda, Flap, Minitron, ActivationPower)
