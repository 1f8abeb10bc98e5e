"""Pruning criteria of what reads a unit: the weights that read it, and what they read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nodelens.network.group_layer import GroupLayer, Kernels
from nodelens.statistics import Moments
from nodelens.statistics.position_power import PositionPower

from .base import Metric
from .need import Need


@dataclass(frozen=True)
class _OfReaders(Metric):
    """What scores of the readers of a unit share: moments of what each consumer reads, over all rows.

    The units of an expert are read times its router's weight, which is 0 for a token that goes elsewhere: a mixture is one wide
    FFN of all experts' units.
    """

    weighted: ClassVar = True
    parameter: ClassVar = "group"
    reads_consumers: ClassVar = True
    nan: ClassVar = "no rows"

    def needs(self) -> dict[str, Need]:
        return {"x": Need(Moments, "consumed")}

    @staticmethod
    def at_places(group: GroupLayer, x: Sequence[Moments], value: Callable[[Moments, Kernels], Tensor]) -> list[Tensor]:
        """A value of each place a consumer reads, at the places of each unit: (units, places) for each consumer."""
        return [value(moments, kernels)[kernels.places] for moments, kernels in zip(x, group.kernels, strict=True)]


@dataclass(frozen=True)
class Wanda(_OfReaders):
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

    def __call__(self, weight: GroupLayer, x: Sequence[Moments]) -> Tensor:
        def value(moments: Moments, kernels: Kernels) -> Tensor:
            return kernels.weight.abs().sum(2).mean(1) * (moments.n * moments.mean_square.clamp_min(0)).sqrt()

        return sum(each.sum(1) for each in self.at_places(weight, x, value))  # type: ignore[return-value]


@dataclass(frozen=True)
class Flap(_OfReaders):
    """Spread of a unit times the squared weights that read it: what is lost when its mean stays, as a bias.

    A large mean costs nothing here: use it with that bias. The paper compares layers by z-scores within each.

    Formula: mean over u's places of Var(x_u) ||K(u)||_2^2; over consumers their sum; Var unbiased, over all rows
    Shapes: x over rows of what consumers read -> (units,)
    Unit:   that of weights times x, squared, >= 0
    NaN:    fewer than two rows
    Source: An et al. 2024, 2312.11983, eqs. 5 and 6
    """

    names: ClassVar = ("flap",)
    nan: ClassVar = "fewer than two rows"

    def __call__(self, weight: GroupLayer, x: Sequence[Moments]) -> Tensor:
        def value(moments: Moments, kernels: Kernels) -> Tensor:
            return moments.variance * kernels.weight.square().sum((1, 2))

        return sum(each.mean(1) for each in self.at_places(weight, x, value))  # type: ignore[return-value]


@dataclass(frozen=True)
class ActivationPower(_OfReaders):
    """Mean square of a unit where it is read: the control for every score that reads a loss.

    Formula: E x_u^2 over all rows, summed over u's places; over consumers their mean
    Shapes: x over rows of what consumers read -> (units,)
    Unit:   that of x squared, >= 0
    NaN:    no rows
    Source: 2604.23475
    """

    names: ClassVar = ("activation_power",)

    def __call__(self, weight: GroupLayer, x: Sequence[Moments]) -> Tensor:
        parts = self.at_places(weight, x, lambda moments, kernels: moments.mean_square.clamp_min(0))
        return sum(each.sum(1) for each in parts) / len(parts)  # type: ignore[return-value]


@dataclass(frozen=True)
class Minitron(_OfReaders):
    """Size of a unit over samples, averaged over positions; of a head that of its whole output.

    The paper takes the L2 norm over each batch; here it is over all samples, so that the batch size does not matter: the value
    grows with their number's square root, the order does not. It keeps (units, positions) float64 for each consumer.

    Formula: mean_t sqrt(sum_n ||x_u(n, t)||_2^2), the inner norm over u's places; t the positions that some sample has; over
             consumers their sum
    Shapes: x (samples, places, positions) of what consumers read -> (units,)
    Unit:   that of x, >= 0
    NaN:    no rows
    Source: Muralidharan et al. 2024, 2407.14679, section 2.2 (L2 over the batch, mean over the sequence)
    """

    names: ClassVar = ("minitron",)

    def needs(self) -> dict[str, Need]:
        return {"x": Need(PositionPower, "consumed")}

    def __call__(self, weight: GroupLayer, x: Sequence[PositionPower]) -> Tensor:
        parts = zip(x, weight.readers, strict=True)
        return sum(p.power[m.places].sum(1)[:, p.n > 0].sqrt().mean(1) for p, m in parts)  # type: ignore[return-value]


METRICS: tuple[type[Metric], ...] = (Wanda, Flap, ActivationPower, Minitron)
