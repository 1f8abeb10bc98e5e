"""Criteria of what consumers read of a unit: means and spreads of one forward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...distributed import reduce_sums, reduce_tensor, world
from ...experts import Call
from ...rows import Rows
from ...statistics import Accumulator, Moments
from ..axis import Axis, Cut
from .base import Baseline, Found, added
from .passes import Need, Sums, consumers, counted

Place = tuple[str, int | None]  # where units are read: a module, and which of its experts


class _OfConsumers(Sums):
    """What passes at the consumers.

    The units of an expert are read times its router's weight, w u, which is 0 for a token that goes elsewhere: a mixture is one
    wide FFN of all experts' units. A row is any token that is not padded; those that go elsewhere are counted, not formed.
    """

    reads: ClassVar = True

    def __init__(self, model: nn.Module, axes: Sequence[Axis]):
        super().__init__(model, axes)
        self.cuts = consumers(axes)
        self.paths = list(dict.fromkeys(cut.module for cut in self.cuts if cut.entry is None))
        self.mixtures = list(dict.fromkeys(cut.module for cut in self.cuts if cut.entry is not None))

    def called(self, path: str, call: Call) -> None:
        counts = counted(call, self.frame)
        for expert in dict.fromkeys(cut.entry for cut in self.cuts if cut.module == path):
            assert expert is not None
            share = call.share(expert).only(counts.flatten())
            x = call.hidden(expert, share).double() * share.weights.double()
            self.see_routed((path, expert), x, share.tokens, counts)

    def see_routed(self, place: Place, x: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """Takes w u of an expert (r, units) float64 at tokens (r,) of those that count, (samples, positions) bool."""


def place_of(cut: Cut) -> Place:
    """Where a consumer's units are read."""
    return cut.module, cut.entry


class ReadSums(_OfConsumers):
    """Moments of each consumer's input, a row a position."""

    def __init__(self, model: nn.Module, axes: Sequence[Axis]):
        super().__init__(model, axes)
        self.moments = {place_of(cut): Accumulator(Moments) for cut in self.cuts}
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

    totals {cut: (units, positions)}; rows {cut: (positions,)}, how many samples have a token there. A position is the number of
    counted tokens before it, so that padding on either side moves none.
    """

    def __init__(self, model: nn.Module, axes: Sequence[Axis]):
        super().__init__(model, axes)
        self.totals = {cut: self.zeros(len(cut.places), 0) for cut in self.cuts}
        self.rows = {cut: self.zeros(0) for cut in self.cuts}

    def see(self, path: str, rows: Rows) -> None:
        keep = rows.mask()
        place = (keep.cumsum(1) - 1).clamp_min(0)  # (samples, positions)
        for cut in self.cuts:
            if cut.module == path:
                power = rows.x.double().square()[:, cut.places.to(rows.raw.device)].sum(2)  # (samples, units, positions)
                moved = torch.zeros_like(power).scatter_add_(2, place[:, None].expand_as(power), power).sum(0)
                count = torch.zeros_like(place).scatter_add_(1, place, keep.long()).sum(0).double()
                self.totals[cut] = _longer(self.totals[cut], moved)
                self.rows[cut] = _longer(self.rows[cut], count)

    def see_routed(self, place: Place, x: Tensor, tokens: Tensor, counts: Tensor) -> None:
        at = (counts.cumsum(1) - 1).clamp_min(0).flatten()  # (tokens,)
        count = torch.zeros_like(at).index_add_(0, at, counts.flatten().long())[: counts.shape[1]].double()
        for cut in self.cuts:
            if place_of(cut) == place:
                power = x.where(x.isfinite(), 0).square()[:, cut.places.to(x.device)].sum(2).T  # (units, tokens of this expert)
                moved = power.new_zeros(len(power), counts.shape[1]).index_add_(1, at[tokens], power)
                self.totals[cut] = _longer(self.totals[cut], moved)
                self.rows[cut] = _longer(self.rows[cut], count)

    def reduce(self) -> None:
        for cut in self.cuts:
            lengths = torch.zeros(world()[1], dtype=torch.long, device=self.device)
            lengths[world()[0]] = self.rows[cut].shape[-1]
            longest = int(reduce_tensor(lengths).max())
            self.totals[cut] = reduce_tensor(_longer(self.totals[cut], self.zeros(len(cut.places), longest)))
            self.rows[cut] = reduce_tensor(_longer(self.rows[cut], self.zeros(longest)))


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


def _at_places(axis: Axis, found: Found, value: Callable[[Moments, Cut], Tensor]) -> list[Tensor]:
    """A value a place of a consumer's input, at the places of each unit: (units, places) a consumer."""
    moments = found.sums[Need(ReadSums)].moments
    values = ((cut, value(moments[place_of(cut)].value, cut)) for cut in axis.by_role("consumer"))
    return [each[cut.places.to(each.device)] for cut, each in values]


def kernels(model: nn.Module, cut: Cut) -> Tensor:
    """What reads each place of a consumer's input, (places, outputs, kernel) float64; outputs are those of the place's group."""
    module, weight = model.get_submodule(cut.module), cut.of(model).double()
    if isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
        by_group = weight.unflatten(0, (module.groups, -1)).transpose(1, 2)  # (groups, inputs of one, outputs of one, ...)
        return by_group.flatten(0, 1).flatten(2)
    moved = weight.movedim(cut.dim - (cut.entry is not None), 0)
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

    def __call__(self, axis: Axis, found: Found) -> Tensor:
        def value(x: Moments, cut: Cut) -> Tensor:
            norm = (x.n * x.mean_square.clamp_min(0)).sqrt()
            return kernels(found.model, cut).abs().sum(2).mean(1) * norm

        return added(each.sum(1) for each in _at_places(axis, found, value))


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

    def __call__(self, axis: Axis, found: Found) -> Tensor:
        def value(x: Moments, cut: Cut) -> Tensor:
            return x.variance * kernels(found.model, cut).square().sum((1, 2))

        return added(each.mean(1) for each in _at_places(axis, found, value))


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

    def __call__(self, axis: Axis, found: Found) -> Tensor:
        parts = _at_places(axis, found, lambda x, cut: x.mean_square.clamp_min(0))
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

    def __call__(self, axis: Axis, found: Found) -> Tensor:
        power = found.sums[Need(PositionSums)]
        cuts = axis.by_role("consumer")
        return added(power.totals[cut][:, power.rows[cut] > 0].sqrt().mean(1) for cut in cuts)


BASELINES: tuple[type[Baseline], ...] = (Wanda, Flap, Minitron, ActivationPower)
