"""Pruning criteria from gates on units: how much the loss of a sample changes when a unit is removed."""

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
    """First-order change of a sample's loss when the unit is removed by a gate: its mean square over samples.

    For a layer, the gate multiplies its output; for a pruning group, the inputs of all consumers. The paper squares per mini-batch;
    here the square is per sample, so that the batch size does not matter. ``abs`` takes absolute values instead of squares.

    Formula: E_n q^2, or E_n|q|; q = sum of u dL/du over positions, places and consumers, L the sample's summed loss
    Shapes: q over samples of width units -> (units,)
    Unit:   that of the loss squared (of the loss with ``abs``), >= 0. Loss w u, u ~ N(0, 1): w^2
    NaN:    no rows
    Raises: ValueError when there are no labels to take a loss from
    Source: Molchanov et al. 2019, 1906.10771, eq. 8 (gates); 2017, 1611.06440, eq. 7 (absolute values)
    """

    names: ClassVar = ("taylor",)
    log_interval: ClassVar = True
    whole_experts: ClassVar = True
    abs: bool = False

    def needs(self) -> dict[str, Need]:
        return {"q": Need(Sizes if self.abs else Moments, "output*grad", "samples")}

    def __call__(self, weight: Tensor | None, q: Sizes | Moments) -> Tensor:
        return q.absolute / q.n if isinstance(q, Sizes) else mean_square(q)


@dataclass(frozen=True)
class TaylorProducer(Metric):
    """First-order change of a sample's loss when the weights and biases that produce the unit are set to zero.

    It differs from ``taylor`` where a norm or a nonlinear activation follows the producer. Before a batch norm in training mode it
    would be 0, so scores are computed in evaluation mode.

    Formula: E_n (sum of y_u dL/dy_u)^2 over positions and producers, y their own outputs; = E_n (sum of w g_nw over the weights
             and biases that produce the unit)^2
    Shapes: q over samples of width units -> (units,)
    Unit:   that of the loss squared, >= 0
    NaN:    no rows
    Raises: ValueError when there are no labels to take a loss from
    Source: Molchanov et al. 2019, 1906.10771, eq. 8 (weights of a filter)
    """

    names: ClassVar = ("taylor_producer",)

    def needs(self) -> dict[str, Need]:
        return {"q": Need(Moments, "made*grad", "samples")}

    def __call__(self, weight: Tensor | None, q: Moments) -> Tensor:
        return mean_square(q)


@dataclass(frozen=True)
class LossProxy(Metric):
    """Cost of removing a unit in a second-order model of the loss whose Hessian is the empirical Fisher information.

    ``unit: sequence`` first sums q over a sample, which ranks units like ``taylor`` for images; ``token`` takes tokens separately.

    Formula: 0.5 E q^2, q = sum of u dL/du over places, and with ``sequence`` over positions and consumers
    Shapes: q over rows of width units -> (units,)
    Unit:   that of the loss squared, >= 0. Loss w u, u ~ N(0, 1): w^2 / 2
    NaN:    no rows
    Raises: ValueError when there are no labels, or for ``token`` where a group is not read by exactly one linear layer
    Source: 2604.23475; LeCun et al. 1990, Optimal Brain Damage, eq. 5
    """

    names: ClassVar = ("loss_proxy",)
    log_interval: ClassVar = True
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
    return x.mean_square.clamp_min(0)  # negative by rounding only


def check_tokens(group: GroupLayer, unit: Unit) -> None:
    """Raises ValueError for tokens where a group is not read by exactly one linear layer, so that tokens are not separate."""
    readers = [group.module.get_submodule(member.piece.module) for member in group.readers]
    if unit == "token" and (len(readers) != 1 or Layer("", readers[0]).places_units_second):
        names = zip(group.readers, readers, strict=True)
        reads = ", ".join(f"{member.piece.module} ({type(module).__name__})" for member, module in names)
        raise ValueError(
            f"group {group.title!r} has no tokens of its own: it is read by {reads}, not by one linear layer; set unit: sequence"
        )
