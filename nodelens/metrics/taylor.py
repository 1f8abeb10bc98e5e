"""Pruning criteria of gates on units: what the loss of a sample changes by when a unit goes."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nodelens.network.group_layer import GroupLayer
from nodelens.network.layers import Layer
from nodelens.statistics import Moments, Sizes

from .base import Metric
from .model_sums import Unit
from .need import Need


@dataclass(frozen=True)
class Taylor(Metric):
    """First-order change of a sample's loss when the unit goes, at a gate on it.

    Of a layer the gate stands on its output; of a pruning group before all that read its units. The paper squares per
    mini-batch; here it is per sample, so that the batch size does not matter. ``abs`` takes sizes.

    Formula: E_n q^2, or E_n|q|; q = sum of u dL/du over positions, places and consumers, L the sample's summed loss
    Shapes: q over samples of width units -> (units,)
    Unit:   that of the loss squared (of the loss with ``abs``), >= 0. Loss w u, u ~ N(0, 1): w^2
    NaN:    no rows
    Raises: ValueError when there are no labels to take a loss from
    Source: Molchanov et al. 2019, 1906.10771, eq. 8 (gates); 2017, 1611.06440, eq. 7 (sizes)
    """

    names: ClassVar = ("taylor",)
    nan: ClassVar = "no rows"
    whole_experts: ClassVar = True
    abs: bool = False

    def needs(self) -> dict[str, Need]:
        return {"q": Need(Sizes if self.abs else Moments, "output*grad", "samples")}

    def __call__(self, weight: Tensor | None, q: Sizes | Moments) -> Tensor:
        return q.absolute / q.n if isinstance(q, Sizes) else mean_square(q)


@dataclass(frozen=True)
class TaylorProducer(Metric):
    """First-order change of a sample's loss when what makes the unit is zeroed, its bias included.

    It is not ``taylor``: what a norm's shift or a curved activation puts behind the producer stays. Behind a batch norm in train
    mode it would be 0; scores are taken in eval mode.

    Formula: E_n (sum of y_u dL/dy_u)^2 over positions and producers, y their own outputs; = E_n (sum of w g_nw over P(u), biases
             included)^2
    Shapes: q over samples of width units -> (units,)
    Unit:   that of the loss squared, >= 0
    NaN:    no rows
    Raises: ValueError when there are no labels to take a loss from
    Source: Molchanov et al. 2019, 1906.10771, eq. 8 (weights of a filter)
    """

    names: ClassVar = ("taylor_producer",)
    nan: ClassVar = "no rows"

    def needs(self) -> dict[str, Need]:
        return {"q": Need(Moments, "made*grad", "samples")}

    def __call__(self, weight: Tensor | None, q: Moments) -> Tensor:
        return mean_square(q)


@dataclass(frozen=True)
class LossProxy(Metric):
    """What a unit's removal costs in a second-order model of the loss whose Hessian is the empirical Fisher information.

    ``unit: sequence`` adds q over a sample first (for images the order is ``taylor``'s), ``token`` takes every token alone.

    Formula: 0.5 E q^2, q = sum of u dL/du over places, and over positions and consumers of a sequence
    Shapes: q over rows of width units -> (units,)
    Unit:   that of the loss squared, >= 0. Loss w u, u ~ N(0, 1): w^2 / 2
    NaN:    no rows
    Raises: ValueError when there are no labels, or for ``token`` where other than one linear layer reads a pruning group
    Source: 2604.23475; LeCun et al. 1990, Optimal Brain Damage, eq. 5
    """

    names: ClassVar = ("loss_proxy",)
    nan: ClassVar = "no rows"
    whole_experts: ClassVar = True
    unit: Unit = "sequence"

    def needs(self) -> dict[str, Need]:
        return {"q": Need(Moments, "output*grad", "samples" if self.unit == "sequence" else "positions")}

    def check_group(self, name: str, group: GroupLayer) -> None:
        check_tokens(group, self.unit)

    def __call__(self, weight: Tensor | None, q: Moments) -> Tensor:
        return 0.5 * mean_square(q)


def mean_square(x: Moments) -> Tensor:
    """Mean of x^2, (units,)."""
    return x.mean_square.clamp_min(0)  # a sum of squares: below 0 by rounding alone


def check_tokens(group: GroupLayer, unit: Unit) -> None:
    """Raises ValueError where a group's units have no tokens of their own: other than one linear layer reads them."""
    readers = [group.module.get_submodule(member.piece.module) for member in group.readers]
    if unit == "token" and (len(readers) != 1 or Layer("", readers[0]).places_units_second):
        names = zip(group.readers, readers, strict=True)
        reads = ", ".join(f"{member.piece.module} ({type(module).__name__})" for member, module in names)
        raise ValueError(
            f"group {group.title!r} has no tokens of its own: it is read by {reads}, not by one linear layer; take unit: sequence"
        )


METRICS: tuple[type[Metric], ...] = (Taylor, TaylorProducer, LossProxy)
