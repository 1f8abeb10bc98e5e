"""What a unit matters to the loss, told by gradients of the SUMMED loss: no value depends on batch size or loss scale."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from nodelens.statistics import Moments, Sizes
from nodelens.statistics.linalg import ROUNDING
from nodelens.statistics.weight_sums import WeightSums

from .base import Metric
from .model_sums import LossReduction
from .need import Need
from .taylor import mean_square


@dataclass(frozen=True)
class _Removal(Metric):
    """What the scores of q = u dL/du share: which rows are summed before a size or a square is taken.

    Of a map q is summed over a sample's positions first (``spatial: sum_then_abs``): the first-order change of its loss
    when the whole map goes. ``per_position`` takes each position as a row. A token is a row; ``tokens: per_sequence`` sums
    over the sequence first. ``loss_reduction: mean`` divides a sample's gradients by its predicted tokens.
    """

    nan: ClassVar = "no rows"
    spatial: Literal["sum_then_abs", "per_position"] = "sum_then_abs"
    tokens: Literal["each", "per_sequence"] = "each"
    loss_reduction: LossReduction = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spatial == "per_position" and self.tokens == "per_sequence":
            raise ValueError(
                f"{self.names[0]}: spatial: per_position takes each row alone, tokens: per_sequence adds them; choose one"
            )

    def product(self, statistic: type[Moments] | type[Sizes]) -> dict[str, Need]:
        """The need of q in the rows that the options name."""
        view = "positions" if self.spatial == "per_position" else "samples" if self.tokens == "per_sequence" else "whole"
        return {"q": Need(statistic, _port("output*grad", self.loss_reduction), view)}


def _port(name: str, loss_reduction: str) -> str:
    return name if loss_reduction == "sum" else f"{name}/tokens"


@dataclass(frozen=True)
class TaylorSaliency(_Removal):
    """First-order change of the loss when a unit is set to zero, its mean size; ``taylor`` is the mean square of each sample's.

    Of a map q is summed over a sample's positions first (``spatial: sum_then_abs``), one row a sample; ``per_position``
    takes each position as a row. Of texts each token is a row; ``tokens: per_sequence`` sums q over the sequence first.
    ``loss_reduction: mean`` takes the mean loss of each text. ``mode: mean_abs`` is |E q|, ``sq_mean`` E q^2.

    Formula: E|q|, q = y dL/dy, y the unit's output, L the summed loss, E the mean over rows
    Shapes: q over rows of width units -> (units,)
    Unit:   that of the loss (squared for ``sq_mean``), >= 0. Loss w u, u ~ N(0, 1): 0.7979 |w|
    NaN:    no rows
    Raises: ValueError when there are no labels to take a loss from, or for per_position with per_sequence
    Source: Molchanov et al. 2017, 1611.06440, eq. 7; Molchanov et al. 2019, 1906.10771, eq. 8
    """

    names: ClassVar = ("taylor_saliency",)
    mode: Literal["abs_mean", "mean_abs", "sq_mean"] = "abs_mean"

    def needs(self) -> dict[str, Need]:
        return self.product(Sizes if self.mode == "abs_mean" else Moments)

    def __call__(self, weight: Tensor | None, q: Sizes | Moments) -> Tensor:
        if isinstance(q, Sizes):
            return q.absolute / q.n
        return q.mean.abs() if self.mode == "mean_abs" else mean_square(q)


@dataclass(frozen=True)
class FisherInformation(_Removal):
    """Diagonal of the empirical Fisher information of a mask m on the units, y m at m = 1.

    Taken at the data's labels: at a minimum of the loss a stand-in for its curvature in m, elsewhere it may lie far off
    (Kunstner 2019, 1905.12558). Not halved; half of it is ``scar_loss_proxy``. Options as in ``taylor_saliency``;
    ``tokens: per_sequence`` is a mask that holds for a whole text.

    Formula: E q^2, q = y dL/dy = dL/dm, y the unit's output, L the summed loss, E the mean over rows
    Shapes: q over rows of width units -> (units,)
    Unit:   that of the loss squared, >= 0. Loss w u, u ~ N(0, 1): w^2
    NaN:    no rows
    Raises: ValueError when there are no labels to take a loss from, or for per_position with per_sequence
    Source: Theis et al. 2018, 1801.05787, "Fisher pruning" (pruning feature maps; half of it)
    """

    names: ClassVar = ("fisher_information",)

    def needs(self) -> dict[str, Need]:
        return self.product(Moments)

    def __call__(self, weight: Tensor | None, q: Moments) -> Tensor:
        return mean_square(q)


@dataclass(frozen=True)
class ScarActivationPower(Metric):
    """Mean square of a unit; of a map each position is a row. It reads no gradient: the part of the proxy that is the unit's own.

    Formula: E u^2, u the unit's value (of an FFN what its last projection reads), E the mean over rows
    Shapes: u over rows of width units -> (units,)
    Unit:   that of u squared, >= 0. N(0, 1) rows: 1
    NaN:    no rows
    Source: 2604.23475
    """

    names: ClassVar = ("scar_activation_power",)
    nan: ClassVar = "no rows"

    def needs(self) -> dict[str, Need]:
        return {"u": Need(Moments, "output")}

    def __call__(self, weight: Tensor | None, u: Moments) -> Tensor:
        return mean_square(u)


@dataclass(frozen=True)
class ScarTaylor(_Removal):
    """First-order change of the loss when a unit goes: ``taylor_saliency`` at the unit the scar scores are about.

    Options as in ``taylor_saliency``.

    Formula: E|q|, q = u dL/du, u the unit's value, L the summed loss, E the mean over rows
    Shapes: q over rows of width units -> (units,)
    Unit:   that of the loss, >= 0. Loss w u, u ~ N(0, 1): 0.7979 |w|
    NaN:    no rows
    Raises: ValueError when there are no labels to take a loss from, or for per_position with per_sequence
    Source: 2604.23475; Molchanov et al. 2019, 1906.10771, eq. 8
    """

    names: ClassVar = ("scar_taylor",)

    def needs(self) -> dict[str, Need]:
        return self.product(Sizes)

    def __call__(self, weight: Tensor | None, q: Sizes) -> Tensor:
        return q.absolute / q.n


@dataclass(frozen=True)
class Curvature(Metric):
    """Mean square of the loss's slope in a unit: the empirical Fisher's diagonal for a shift of the unit.

    Of a map each position is a row. ``loss_reduction: mean`` takes the mean loss of each text.

    Formula: E g^2, g = dL/du, u the unit's value, L the summed loss, E the mean over rows
    Shapes: g over rows of width units -> (units,)
    Unit:   that of the loss over u, squared, >= 0. Loss w u: w^2
    NaN:    no rows
    Raises: ValueError when there are no labels to take a loss from
    Source: 2604.23475; caveat: Kunstner et al. 2019, 1905.12558
    """

    names: ClassVar = ("scar_curvature",)
    nan: ClassVar = "no rows"
    loss_reduction: LossReduction = "sum"

    def needs(self) -> dict[str, Need]:
        return {"g": Need(Moments, _port("grad", self.loss_reduction))}

    def __call__(self, weight: Tensor | None, g: Moments) -> Tensor:
        return mean_square(g)


@dataclass(frozen=True)
class ScarLossProxy(_Removal):
    """What removing a unit costs in a second-order model of the loss whose Hessian is the empirical Fisher information.

    Options as in ``taylor_saliency``; a text of T predicted tokens has T^2 times the value of ``loss_reduction: mean``.

    Formula: 0.5 E q^2, q = u dL/du, u the unit's value, L the summed loss, E the mean over rows
    Shapes: q over rows of width units -> (units,)
    Unit:   that of the loss squared, >= 0. Loss w u, u ~ N(0, 1): w^2 / 2
    NaN:    no rows
    Raises: ValueError when there are no labels to take a loss from, or for per_position with per_sequence
    Source: 2604.23475; LeCun et al. 1990, Optimal Brain Damage, eq. 5; Theis et al. 2018, 1801.05787
    """

    names: ClassVar = ("scar_loss_proxy", "lp")

    def needs(self) -> dict[str, Need]:
        return self.product(Moments)

    def __call__(self, weight: Tensor | None, q: Moments) -> Tensor:
        return 0.5 * mean_square(q)


@dataclass(frozen=True)
class LossProxyFactored(Metric):
    """The loss proxy with power and curvature each averaged on its own: the same when u^2 and g^2 do not correlate.

    Of a map each position is a row. ``loss_reduction: mean`` takes the mean loss of each text.

    Formula: 0.5 E[u^2] E[g^2], g = dL/du, u the unit's value, L the summed loss, E the mean over rows
    Shapes: u and g over rows of width units -> (units,)
    Unit:   that of the loss squared, >= 0. Loss w u, u ~ N(0, 1): w^2 / 2
    NaN:    no rows
    Raises: ValueError when there are no labels to take a loss from
    Source: 2604.23475
    """

    names: ClassVar = ("scar_loss_proxy_factored",)
    nan: ClassVar = "no rows"
    loss_reduction: LossReduction = "sum"

    def needs(self) -> dict[str, Need]:
        return {"u": Need(Moments, "output"), "g": Need(Moments, _port("grad", self.loss_reduction))}

    def __call__(self, weight: Tensor | None, u: Moments, g: Moments) -> Tensor:
        return 0.5 * mean_square(u) * mean_square(g)


@dataclass(frozen=True)
class GradientAlignment(Metric):
    """How alike a rule that sees the layer alone and the loss's gradient are in how they would change a unit's weights.

    ``local_signal: hebbian`` is sum y x'; ``input`` is sum x, the same for all units that read it. What a unit puts out
    is one number over its fan-in and so correlates with nothing: it is no choice.

    Formula: |corr over the fan-in of (s, dL/dw)|, s = sum over rows of y x' (hebbian), x the inputs, w the weights, y the output
    Shapes: sums over rows, (units, fan_in) -> (units,)
    Unit:   none, in [0, 1]; proportional to the gradient: 1. Unrelated: about 0.8/sqrt(fan_in)
    NaN:    the signal or the gradient is the same at every input, as of a dead unit or with a fan-in of 1
    Raises: ValueError when there are no labels to take a loss from
    Source: definition
    """

    names: ClassVar = ("gradient_alignment",)
    nan: ClassVar = "the signal or the gradient is the same at every input"
    local_signal: Literal["hebbian", "input"] = "hebbian"

    def needs(self) -> dict[str, Need]:
        return {"sums": Need(WeightSums, "weight*grad", "samples")}

    def __call__(self, weight: Tensor | None, sums: WeightSums) -> Tensor:
        s, g = self._signals(sums)
        value = (s * g).sum(1) / (s.square().sum(1) * g.square().sum(1)).sqrt()
        return value.abs()

    def counts(self, weight: Tensor | None, sums: WeightSums) -> dict[str, int]:
        s, g = self._signals(sums)
        return {"constant": int((~(s.any(1) & g.any(1))).sum())}

    def _signals(self, sums: WeightSums) -> tuple[Tensor, Tensor]:
        """Signal and gradient about their means over the fan-in, (units, fan_in), each at most 1; 0 where constant."""
        units, fan_in = sums.gradient.shape
        groups = len(sums.inputs) // fan_in
        signal = sums.inputs.reshape(groups, fan_in).repeat_interleave(units // groups, 0)
        return _centred(sums.hebbian if self.local_signal == "hebbian" else signal), _centred(sums.gradient)


def _centred(x: Tensor) -> Tensor:
    """Rows about their means, at most 1 in size so that no square of theirs is too small; 0 where a row does not vary."""
    size = x.abs().amax(1, keepdim=True)
    scaled = (x / size).where(size > 0, 0)
    centred = scaled - scaled.mean(1, keepdim=True)
    return centred.where(centred.abs().amax(1, keepdim=True) > ROUNDING, 0)


METRICS: tuple[type[Metric], ...] = (
    TaylorSaliency,
    FisherInformation,
    ScarActivationPower,
    ScarTaylor,
    Curvature,
    ScarLossProxy,
    LossProxyFactored,
    GradientAlignment,
)
