"""Mutual information of units with each other, with a target and with their input. Gaussian, in nats."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nodelens.statistics import Cross, Gram, Moments, Pair
from nodelens.statistics.base import derived
from nodelens.statistics.linalg import MI_CEILING, gaussian_information, joint_bias

from .base import Metric, mean_of_partners
from .covariances import axes_of, constant_units, correlation_of
from .need import Need, Target, View
from .paired_target import check_target, constant_targets, stored_target, target_needs, target_rows, whitening, with_targets

CLOSE = 1.1  # ratio of the first two eigenvalues, below which their axes are arbitrary


@dataclass(frozen=True)
class PairwiseRedundancy(Metric):
    """Gaussian mutual information of the activations of two units, for ALL pairs: high for units that others duplicate.

    ``reduce: mean`` averages over the N - 1 other units; ``none`` gives the matrix, with diagonal 0. Constant units have 0 and are
    counted (``constant``), as are pairs at the upper limit (``saturated``). Independent units give about 1/(2n) rather than 0,
    which ``bias: gaussian`` subtracts; for dependent rows, such as positions of one image, it subtracts too little.

    Formula: -0.5 ln(1 - rho_ij^2), rho_ij = corr(y_i, y_j); bias: [psi((n-1)/2) - psi((n-2)/2)]/2, n rows, psi digamma
    Shapes: y over rows of width units -> (units,) or (units, units)
    Unit:   nats, in [0, 6.908]; rho = 0.6: 0.2231
    NaN:    fewer than two rows (three with a bias correction); the mean in a layer of one unit
    Source: Cover & Thomas 2006, Elements of Information Theory, ch. 8; bias: Ince et al. 2017, doi 10.1002/hbm.23471, eq. 5
    """

    names: ClassVar = ("redundancy",)
    kind: ClassVar = "pair"
    nan: ClassVar = "fewer than two rows (three with a bias correction), or a layer of one unit"
    higher_is_better: ClassVar = False
    reduce: Literal["mean", "none"] = "mean"
    view: View = "positions"
    bias: Literal["none", "gaussian"] = "none"

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Gram, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Gram) -> Tensor:
        pairs = pair_information(y, self.bias)
        return mean_of_partners(pairs) if self.reduce == "mean" else pairs

    def counts(self, weight: Tensor | None, y: Gram) -> dict[str, int]:
        return {"constant": int(constant_units(y).sum()), "saturated": saturated(y)}


@dataclass(frozen=True)
class AverageRedundancy(PairwiseRedundancy):
    """Gaussian mutual information of two units, for ALL pairs, computed from inputs and weights.

    For a Linear or a convolution it equals redundancy, because a bias is constant: in a pass over data both use the products of the
    outputs. When computed from tensors, inputs and weights take precedence over outputs. Options are those of redundancy.

    Formula: -0.5 ln(1 - rho_ij^2), rho_ij = w_i'Cw_j / sqrt(w_i'Cw_i w_j'Cw_j), w the units' weights, C the inputs' covariance
    Shapes: y = x W' over rows of width units -> (units,) or (units, units)
    Unit:   nats, in [0, 6.908]; rho = 0.6: 0.2231
    NaN:    fewer than two rows (three with a bias correction); the mean in a layer of one unit
    Source: Cover & Thomas 2006, Elements of Information Theory, ch. 8; bias: Ince et al. 2017, doi 10.1002/hbm.23471, eq. 5
    """

    names: ClassVar = ("input_side_redundancy",)

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Gram, "projection", self.view)}


@dataclass(frozen=True)
class LayerRedundancy(Metric):
    """Mean Gaussian mutual information over ALL pairs of units of a layer: the mean of redundancy.

    Formula: sum_ij -0.5 ln(1 - rho_ij^2) / (N (N - 1)) over i != j, rho_ij = corr(y_i, y_j), N units; bias as in redundancy
    Shapes: y over rows of width units -> ()
    Unit:   nats, in [0, 6.908]; all rho = 0.6: 0.2231
    NaN:    fewer than two rows (three with a bias correction); a layer of one unit
    Source: Cover & Thomas 2006, Elements of Information Theory, ch. 8
    """

    names: ClassVar = ("layer_redundancy",)
    kind: ClassVar = "layer"
    nan: ClassVar = "fewer than two rows (three with a bias correction), or a layer of one unit"
    view: View = "positions"
    bias: Literal["none", "gaussian"] = "none"

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Gram, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Gram) -> Tensor:
        return mean_of_partners(pair_information(y, self.bias)).mean()

    def counts(self, weight: Tensor | None, y: Gram) -> dict[str, int]:
        return {"constant": int(constant_units(y).sum()), "saturated": saturated(y)}


@dataclass(frozen=True)
class NodeRedundancy(Metric):
    """Mean absolute correlation of each input feature with the others. For a convolution, a feature is a channel.

    Constant features have 0 and are counted (``constant``). Independent features give about 0.8/sqrt(n) rather than 0.

    Formula: sum_j |corr(x_i, x_j)| / (d - 1) over j != i, x the d input features
    Shapes: x over rows of width d -> (d,)
    Unit:   none, in [0, 1]
    NaN:    fewer than two rows; an input of one feature
    Source: Pearson's correlation, definition
    """

    names: ClassVar = ("input_feature_redundancy",)
    kind: ClassVar = "input"
    nan: ClassVar = "fewer than two rows, or an input of one feature"
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {"x": Need(Gram, "input", self.view)}

    def __call__(self, weight: Tensor | None, x: Gram) -> Tensor:
        return mean_of_partners(correlation_of(x).abs().fill_diagonal_(0))

    def counts(self, weight: Tensor | None, x: Gram) -> dict[str, int]:
        return {"constant": int(constant_units(x).sum())}


@dataclass(frozen=True)
class MutualInformation(Metric):
    """Gaussian mutual information of a unit and a target, or the input's first principal component. It measures linear dependence.

    Targets: logit_margin z_y - max_{k != y} z_k, correct_logit, logits, logit_pc1 (their first principal component), nll or loss
    (-ln p), given, several of these joined by +, or a function of (logits, labels). auto is logit_margin, for language models nll.
    In language models rows are tokens, and the target is that of the next token (of the token itself for given, functions and
    logits); tokens without a target are left out. For several target columns, ``target_reduce: joint`` gives the joint information
    and ``mean`` the mean over columns. ``reference: input_pc1`` reads positions and no target; its axis is arbitrary where the two
    largest input variances are close (``close_eigenvalues``). Independent variables give about 1/(2n) per column, which ``bias:
    gaussian`` subtracts. ``permutations`` adds a permutation test that shuffles the target.

    Formula: -0.5 ln(1 - r'R_z^-1 r), r = corr(y, z) with the columns of the target z, R_z their correlations; input_pc1: z = v'x, v
             the first principal axis of the input x; bias: of one column [psi((n-1)/2) - psi((n-2)/2)]/2, n rows, psi digamma
    Shapes: y over rows of width units, paired with a target -> (units,)
    Unit:   nats, in [0, 6.908]; corr 0.6: 0.2231
    NaN:    fewer than two rows; with a bias correction, at most one more row than target columns
    Raises: ValueError for an unknown target, permutations with input_pc1, or missing labels or logits that the target needs
    Source: Cover & Thomas 2006, Elements of Information Theory, ch. 8; bias: Ince et al. 2017, doi 10.1002/hbm.23471, eq. 5
    """

    names: ClassVar = ("mutual_information_gaussian", "mi_gaussian", "mi")
    nan: ClassVar = "fewer than two rows, or with a bias correction at most one more than target columns"
    target: Target = "auto"
    reference: Literal["target", "input_pc1"] = "target"
    target_reduce: Literal["joint", "mean"] = "joint"
    bias: Literal["none", "gaussian"] = "none"
    permutations: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_target(self.names[0], self.target, self.permutations)
        if self.permutations and self.reference == "input_pc1":
            raise ValueError(f"{self.names[0]}: permutations shuffle a target, but reference: input_pc1 has none; set only one")

    def needs(self) -> dict[str, Need]:
        if self.reference == "input_pc1":
            x, both = Need(Gram, "input"), Need(Pair, "output", "positions", "input")
            return {"y": Need(Gram, "output"), "z": both, "x": x}
        return target_needs(Moments, stored_target(self.target), self.permutations)

    def __call__(self, weight: Tensor | None, y: Moments | Gram, z: Cross | Pair, x: Gram | None = None, **_: Any) -> Tensor:
        y = y.moments if isinstance(y, Gram) else y
        if x is not None:
            r = _with_first_axis(y, z, x)  # type: ignore[arg-type]
            varying = ~constant_units(x).all() * 1.0
        else:
            z = target_rows(z, self.target)  # type: ignore[arg-type]
            r = with_targets(y, z)
            varying = (~constant_targets(z)).double().mean()
        if self.target_reduce == "joint" and x is None:
            r = r @ whitening(z)
            value, lean = gaussian_information(r.square().sum(1)), joint_bias(z.n, 1, r.shape[1])
        else:
            value, lean = gaussian_information(r.square()).mean(1), joint_bias(z.n, 1, 1) * varying
        return value if self.bias == "none" else value - lean * ~constant_units(y)

    def counts(self, weight: Tensor | None, y: Moments | Gram, z: Cross | Pair, x: Gram | None = None, **_: Any) -> dict[str, int]:
        found = {"constant": int(constant_units(y).sum())}
        if x is None:
            return found
        first, *others = axes_of(x, False)[0].tolist()
        return found | {"close_eigenvalues": int(bool(others) and first < CLOSE * others[0])}


@dataclass(frozen=True)
class AnalyticInformation(Metric):
    """Information that a unit would carry about a Gaussian input through additive noise: its variance, on a logarithmic scale.

    The value depends on noise_std, which has the unit of y, so report it. relative_channel_information derives the noise from the
    variances of the layer.

    Formula: 0.5 ln(1 + w'Cw / s^2), w'Cw = Var y, C the covariance of the input, w the weights, s = noise_std
    Shapes: y over rows of width units -> (units,)
    Unit:   nats, 0 and above; Var y = s^2: 0.3466
    NaN:    fewer than two rows
    Raises: ValueError when noise_std is not above 0
    Source: Cover & Thomas 2006, Elements of Information Theory, section 9.1, capacity of the Gaussian channel
    """

    names: ClassVar = ("noisy_channel_information",)
    noise_std: float = 0.1
    view: View = "positions"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_noise(self.names[0], "noise_std", self.noise_std)

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Moments, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Moments) -> Tensor:
        return 0.5 * torch.log1p(y.variance.where(~constant_units(y) | (y.n < 2), 0.0) / self.noise_std**2)


@dataclass(frozen=True)
class ProxyInformation(Metric):
    """noisy_channel_information with noise set by the layer: a unit's variance relative to the variances in its layer.

    ``noise`` is the median, mean, 75th or 90th percentile of the unit variances of the layer, or a number in the unit of y squared.

    Formula: 0.5 ln(1 + Var y / s^2), s^2 = noise, percentiles by linear interpolation
    Shapes: y over rows of width units -> (units,)
    Unit:   nats, 0 and above; noise median: 0.3466 for a unit of median variance
    NaN:    fewer than two rows; the noise is 0, as when half of the units are constant
    Raises: ValueError for an unknown noise, or one that is not above 0
    Source: Cover & Thomas 2006, Elements of Information Theory, section 9.1, capacity of the Gaussian channel
    """

    names: ClassVar = ("relative_channel_information",)
    nan: ClassVar = "fewer than two rows, or the noise is 0"
    noise: str | float = "median"
    view: View = "positions"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_noise(self.names[0], "noise", self.noise, ("mean", *_PERCENTILES))

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Moments, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Moments) -> Tensor:
        variance = y.variance.where(~constant_units(y) | (y.n < 2), 0.0)
        if isinstance(self.noise, str):
            noise = variance.mean() if self.noise == "mean" else variance.quantile(_PERCENTILES[self.noise])
        else:
            noise = variance.new_tensor(self.noise)
        return 0.5 * torch.log1p(variance / noise.where(noise > 0, torch.nan))


_PERCENTILES = {"median": 0.5, "p75": 0.75, "p90": 0.9}


def check_noise(metric: str, option: str, noise: object, names: tuple[str, ...] = ()) -> None:
    """Raises ValueError for a noise that is neither one of the names nor a number above 0."""
    number = isinstance(noise, (int, float)) and not isinstance(noise, bool)
    if not (noise in names or (number and noise > 0)):  # type: ignore[operator]
        other = f"{', '.join(names)}, or " if names else ""
        raise ValueError(f"{metric}: {option} is {noise!r}; it must be {other}a number above 0")


def saturated(y: Gram) -> int:
    """The number of pairs of units at the upper limit of the information."""
    return int(torch.triu(correlation_of(y).square() >= MI_CEILING, 1).sum())


@derived
def pair_information(y: Gram, bias: str) -> Tensor:
    """Information of each pair of units, (units, units), with diagonal 0, and without its bias where ``bias`` is gaussian."""
    pairs = gaussian_information(correlation_of(y).square())
    if bias == "gaussian":
        live = ~constant_units(y)
        pairs = pairs - joint_bias(y.n, 1, 1) * (live[:, None] & live)
    return pairs.fill_diagonal_(0)


def _with_first_axis(y: Moments, xy: Pair, x: Gram) -> Tensor:
    """Correlations of units with the first principal component of the input, (units, 1)."""
    values, axes = axes_of(x, False)
    live = ~constant_units(y) & ~constant_units(x).all()
    scale = y.variance.where(live, 1.0).sqrt() * values[0].where(live, 1.0).sqrt()
    r = torch.where(live, xy.covariance @ axes[:, 0] / scale, 0.0)
    return r.where((y.n > 1) & (xy.n > 1), torch.nan)[:, None]
