"""Pruning criteria from the consumers of a unit: the weights that read the unit, and their inputs."""

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
    """Shared by scores of a unit's consumers: moments of the inputs of each consumer, over all rows.

    The units of an expert are multiplied by its router weight, which is 0 for tokens routed elsewhere: a mixture counts as one
    wide FFN with the units of all experts.
    """

    weighted: ClassVar = True
    parameter: ClassVar = "group"
    reads_consumers: ClassVar = True
    nan: ClassVar = "no rows"

    def needs(self) -> dict[str, Need]:
        return {"x": Need(Moments, "consumed")}

    @staticmethod
    def at_places(group: GroupLayer, x: Sequence[Moments], value: Callable[[Moments, Kernels], Tensor]) -> list[Tensor]:
        """The values of a consumer's inputs, at the inputs that belong to each unit: (units, places) for each consumer."""
        return [value(moments, kernels)[kernels.places] for moments, kernels in zip(x, group.kernels, strict=True)]


@dataclass(frozen=True)
class Wanda(_OfReaders):
    """Absolute weights that read a unit times the norm of the unit: the structured form of Wanda, called Wanda-sp.

    Published Wanda compares single weights within each output; this is the form for whole units from the FLAP paper. The norm runs
    over all rows (positions of all samples) and is not divided by their number: it grows with the square root of the number of
    rows, which does not change the ranking.

    Formula: sum over u's places of mean_i |K_iu| ||x_u||_2, with kernels summed; summed over consumers
    Shapes: x over rows of the consumers' inputs -> (units,)
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
    """Variance of a unit times the squared weights that read it: the output lost when its mean replaces it.

    A large mean does not raise the score, so add the mean to the consumers' biases. The paper compares layers by z-scores.

    Formula: mean over u's places of Var(x_u) ||K(u)||_2^2, summed over consumers; Var unbiased, over all rows
    Shapes: x over rows of the consumers' inputs -> (units,)
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
    """Mean square of a unit where it is read: a baseline without gradients for the scores that use the loss.

    Formula: E x_u^2 over all rows, summed over u's places, averaged over consumers
    Shapes: x over rows of the consumers' inputs -> (units,)
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
    """L2 norm of a unit over samples, averaged over positions; for an attention head, the norm of its whole output.

    The paper takes the norm over each batch. Here it runs over all samples, so that the batch size does not matter: the value grows
    with the square root of their number, which does not change the ranking. It keeps (units, positions) float64 for each consumer.

    Formula: mean_t sqrt(sum_n ||x_u(n, t)||_2^2), the inner norm over u's places; t the positions that some sample has;
             summed over consumers
    Shapes: x (samples, places, positions) of the consumers' inputs -> (units,)
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
