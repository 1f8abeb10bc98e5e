"""How much a unit matters to the loss, from gradients: these are of the SUMMED loss, so no value depends on the batch size."""

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
    """Options shared by the scores of q = u dL/du: which rows are summed before an absolute value or a square is taken.

    For a feature map, q is first summed over the positions of a sample (``spatial: sum_then_abs``): the first-order change of the
    loss when the whole map is removed. ``per_position`` treats each position as a row. In texts each token is a row;
    ``tokens: per_sequence`` first sums over the sequence. ``loss_reduction: mean`` divides gradients by the predicted tokens.
    """

    nan: ClassVar = "no rows"
    spatial: Literal["sum_then_abs", "per_position"] = "sum_then_abs"
    tokens: Literal["each", "per_sequence"] = "each"
    loss_reduction: LossReduction = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spatial == "per_position" and self.tokens == "per_sequence":
            raise ValueError(f"{self.names[0]}: spatial: per_position keeps rows apart, tokens: per_sequence adds them; choose one")

    def product(self, statistic: type[Moments] | type[Sizes]) -> dict[str, Need]:
        """The need for q, over the rows that the options choose."""
        view = "positions" if self.spatial == "per_position" else "samples" if self.tokens == "per_sequence" else "whole"
        return {"q": Need(statistic, _port("output*grad", self.loss_reduction), view)}


def _port(name: str, loss_reduction: str) -> str:
    return name if loss_reduction == "sum" else f"{name}/tokens"


@dataclass(frozen=True)
class TaylorSaliency(_Removal):
    """First-order change of the loss when a unit is set to zero: its mean absolute value.

    For a feature map, q is first summed over the positions of a sample (``spatial: sum_then_abs``), which gives one row per sample;
    ``per_position`` treats each position as a row. In texts each token is a row; ``tokens: per_sequence`` first sums q over the
    sequence. ``loss_reduction: mean`` uses the mean loss of each text. ``mode: mean_abs`` is |E q| and ``sq_mean`` is E q^2;
    ``taylor`` is the mean square per sample.

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
    """Diagonal of the empirical Fisher information for a mask m that multiplies the units, at m = 1.

    It uses the labels of the data. Near a minimum of the loss it approximates the curvature in m; elsewhere it may be far off
    (Kunstner 2019, 1905.12558). Half of it is ``scar_loss_proxy``. Options are those of ``taylor_saliency``; ``tokens:
    per_sequence`` applies one mask to a whole text.

    Formula: E q^2, q = y dL/dy = dL/dm, y the unit's output, L the summed loss, E the mean over rows
    Shapes: q over rows of width units -> (units,)
    Unit:   that of the loss squared, >= 0. Loss w u, u ~ N(0, 1): w^2
    NaN:    no rows
    Raises: ValueError when there are no labels to take a loss from, or for per_position with per_sequence
    Source: Theis et al. 2018, 1801.05787, "Fisher pruning" (pruning feature maps; with a factor 1/2)
    """

    names: ClassVar = ("fisher_information",)
    log_interval: ClassVar = True

    def needs(self) -> dict[str, Need]:
        return self.product(Moments)

    def __call__(self, weight: Tensor | None, q: Moments) -> Tensor:
        return mean_square(q)


@dataclass(frozen=True)
class ScarActivationPower(Metric):
    """Mean square of a unit, the factor of the loss proxy that needs no gradient; each position of a feature map is a row.

    Formula: E u^2, u the unit's value (in an FFN, the input of its last projection), E the mean over rows
    Shapes: u over rows of width units -> (units,)
    Unit:   that of u squared, >= 0. N(0, 1) rows: 1
    NaN:    no rows
    Source: 2604.23475
    """

    names: ClassVar = ("scar_activation_power",)
    log_interval: ClassVar = True

    def needs(self) -> dict[str, Need]:
        return {"u": Need(Moments, "output")}

    def __call__(self, weight: Tensor | None, u: Moments) -> Tensor:
        return mean_square(u)


@dataclass(frozen=True)
class ScarTaylor(_Removal):
    """First-order change of the loss when a unit is removed: ``taylor_saliency`` under the name that it has among the SCAR scores.

    Options are those of ``taylor_saliency``.

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
    """Mean square of the loss gradient at a unit: the diagonal of the empirical Fisher information for a shift of the unit.

    Each position of a feature map is a row. ``loss_reduction: mean`` uses the mean loss of each text.

    Formula: E g^2, g = dL/du, u the unit's value, L the summed loss, E the mean over rows
    Shapes: g over rows of width units -> (units,)
    Unit:   that of the loss over u, squared, >= 0. Loss w u: w^2
    NaN:    no rows
    Raises: ValueError when there are no labels to take a loss from
    Source: 2604.23475; caveat: Kunstner et al. 2019, 1905.12558
    """

    names: ClassVar = ("scar_curvature",)
    log_interval: ClassVar = True
    loss_reduction: LossReduction = "sum"

    def needs(self) -> dict[str, Need]:
        return {"g": Need(Moments, _port("grad", self.loss_reduction))}

    def __call__(self, weight: Tensor | None, g: Moments) -> Tensor:
        return mean_square(g)


@dataclass(frozen=True)
class ScarLossProxy(_Removal):
    """Cost of removing a unit in a second-order model of the loss whose Hessian is the empirical Fisher information.

    Options are those of ``taylor_saliency``. ``loss_reduction: mean`` divides the value of a text with T predicted tokens by T^2.

    Formula: 0.5 E q^2, q = u dL/du, u the unit's value, L the summed loss, E the mean over rows
    Shapes: q over rows of width units -> (units,)
    Unit:   that of the loss squared, >= 0. Loss w u, u ~ N(0, 1): w^2 / 2
    NaN:    no rows
    Raises: ValueError when there are no labels to take a loss from, or for per_position with per_sequence
    Source: 2604.23475; LeCun et al. 1990, Optimal Brain Damage, eq. 5; Theis et al. 2018, 1801.05787
    """

    names: ClassVar = ("scar_loss_proxy", "lp")
    log_interval: ClassVar = True

    def needs(self) -> dict[str, Need]:
        return self.product(Moments)

    def __call__(self, weight: Tensor | None, q: Moments) -> Tensor:
        return 0.5 * mean_square(q)


@dataclass(frozen=True)
class LossProxyFactored(Metric):
    """Loss proxy with power and curvature averaged separately: equal to the loss proxy when u^2 and g^2 are uncorrelated.

    Each position of a feature map is a row. ``loss_reduction: mean`` uses the mean loss of each text.

    Formula: 0.5 E[u^2] E[g^2], g = dL/du, u the unit's value, L the summed loss, E the mean over rows
    Shapes: u and g over rows of width units -> (units,)
    Unit:   that of the loss squared, >= 0. Loss w u, u ~ N(0, 1): w^2 / 2
    NaN:    no rows
    Raises: ValueError when there are no labels to take a loss from
    Source: 2604.23475
    """

    names: ClassVar = ("scar_loss_proxy_factored",)
    loss_reduction: LossReduction = "sum"

    def needs(self) -> dict[str, Need]:
        return {"u": Need(Moments, "output"), "g": Need(Moments, _port("grad", self.loss_reduction))}

    def __call__(self, weight: Tensor | None, u: Moments, g: Moments) -> Tensor:
        return 0.5 * mean_square(u) * mean_square(g)


@dataclass(frozen=True)
class GradientAlignment(Metric):
    """Correlation of a local learning signal with the loss gradient of a unit's weights: how far a local rule follows the loss.

    ``local_signal: hebbian`` is sum y x'; ``anti_hebbian`` its negative, with the same size of the correlation; ``oja`` is
    sum (y x' - y^2 w), Hebb's rule with a decay that bounds the weights (Oja 1982, J. Math. Biol. 15); ``input`` is sum x,
    which is the same for all units that read it. The output alone is one number for all weights of a unit: no signal.

    Formula: |corr over the fan-in of (s, dL/dw)|, s = sum over rows of y x' (hebbian), x the inputs, w the weights, y the output
    Shapes: sums over rows, (units, fan_in) -> (units,)
    Unit:   none, in [0, 1]; proportional to the gradient: 1; unrelated: about 0.8/sqrt(fan_in)
    NaN:    the signal or the gradient is the same at every input, as for a dead unit or a fan-in of 1
    Raises: ValueError when there are no labels to take a loss from
    Source: definition
    """

    names: ClassVar = ("gradient_alignment",)
    nan: ClassVar = "the signal or the gradient is the same at every input"
    local_signal: Literal["hebbian", "anti_hebbian", "oja", "input"] = "hebbian"

    @property
    def weighted(self) -> bool:
        """Whether the signal reads the weight."""
        return self.local_signal == "oja"

    def needs(self) -> dict[str, Need]:
        sums = {"sums": Need(WeightSums, "weight*grad", "samples")}
        return sums | ({"y": Need(Moments, "output")} if self.weighted else {})

    def __call__(self, weight: Tensor | None, sums: WeightSums, y: Moments | None = None) -> Tensor:
        s, g = self._signals(weight, sums, y)
        value = (s * g).sum(1) / (s.square().sum(1) * g.square().sum(1)).sqrt()
        return value.abs()

    def counts(self, weight: Tensor | None, sums: WeightSums, y: Moments | None = None) -> dict[str, int]:
        s, g = self._signals(weight, sums, y)
        return {"constant": int((~(s.any(1) & g.any(1))).sum())}

    def _signals(self, weight: Tensor | None, sums: WeightSums, y: Moments | None) -> tuple[Tensor, Tensor]:
        """Signal and gradient, scaled and centred over the fan-in, (units, fan_in); 0 where constant."""
        units, fan_in = sums.gradient.shape
        signal = sums.hebbian
        if self.local_signal == "input":
            groups = len(sums.inputs) // fan_in
            signal = sums.inputs.reshape(groups, fan_in).repeat_interleave(units // groups, 0)
        if weight is not None and y is not None:
            signal = signal - (y.mean_square * y.n)[:, None] * weight.double()
        return _centred(signal), _centred(sums.gradient)


def _centred(x: Tensor) -> Tensor:
    """Centred rows, scaled so that their squares do not underflow; 0 where a row is constant."""
    size = x.abs().amax(1, keepdim=True)
    scaled = (x / size).where(size > 0, 0)
    centred = scaled - scaled.mean(1, keepdim=True)
    return centred.where(centred.abs().amax(1, keepdim=True) > ROUNDING, 0)
