"""Size, variance, tails and zeros of a unit's activation."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nodelens.statistics import Gram, Higher, MeanSizes, Moments, Quantiles, Sizes, Zeros
from nodelens.statistics.linalg import constant

from .base import Metric
from .need import Need, View


@dataclass(frozen=True)
class ActivationMean(Metric):
    """Mean absolute activation of a unit; ``absolute: false`` gives the mean, E y.

    Formula: E|y|, y the unit's output, E the mean over rows
    Shapes: y over rows of width units -> (units,)
    Unit:   that of y; >= 0 with ``absolute``. N(0, 1) rows: 0.7979
    NaN:    no rows
    Source: definition
    """

    names: ClassVar = ("activation_mean",)
    absolute: bool = True
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Sizes if self.absolute else Moments, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Sizes | Moments) -> Tensor:
        return y.absolute / y.n if isinstance(y, Sizes) else y.mean


@dataclass(frozen=True)
class ActivationVariance(Metric):
    """Unbiased variance of a unit's activation.

    Formula: sum (y - mean)^2 / (n - 1), y the unit's output in n rows
    Shapes: y over rows of width units -> (units,)
    Unit:   that of y squared, >= 0. N(0, 1) rows: 1; after a ReLU 0.3408
    NaN:    fewer than two rows
    Source: definition
    """

    names: ClassVar = ("activation_variance",)
    log_interval: ClassVar = True
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Moments, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Moments) -> Tensor:
        return y.variance


@dataclass(frozen=True)
class ActivationNorm(Metric):
    """Root mean square of a unit's activation.

    ``normalize: none`` does not divide by n: the value then grows with the square root of the number of rows. ``spatial: mean_abs``
    first averages |y| over the positions of each sample, which gives one row per sample and overrides ``view``.

    Formula: sqrt(sum y^2 / n), y the unit's output in n rows
    Shapes: y over rows of width units -> (units,)
    Unit:   that of y, >= 0. N(0, 1) rows: 1; after a ReLU 0.7071
    NaN:    no rows, with ``normalize: rows``
    Source: definition
    """

    names: ClassVar = ("activation_rms",)
    log_interval: ClassVar = True
    nan: ClassVar = "no rows"
    normalize: Literal["rows", "none"] = "rows"
    spatial: Literal["all", "mean_abs"] = "all"
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        rows = Need(Moments, "output", self.view) if self.spatial == "all" else Need(MeanSizes, "output", "positions")
        return {"y": rows}

    def __call__(self, weight: Tensor | None, y: Moments | MeanSizes) -> Tensor:
        square = y.mean_square.clamp_min(0) * y.n if isinstance(y, Moments) else y.square
        return (square / y.n if self.normalize == "rows" else square.where(y.n > 0, 0)).sqrt()


@dataclass(frozen=True)
class ActivationOutlierIndex(Metric):
    """How far a unit's largest activations exceed its mean absolute activation; it finds units with rare, extreme values.

    Quantiles interpolate linearly between order statistics and are accurate to 1 %. With n (1 - quantile) < 1 the quantile is
    essentially the maximum over rows, which ``largest_value`` flags.

    Formula: Q / E|y|, Q the quantile of |y| (0.999), y the unit's output, E the mean over rows
    Shapes: y over rows of width units -> (units,)
    Unit:   none, >= 0. N(0, 1) rows: 4.124
    NaN:    a unit that is always 0; no rows
    Raises: ValueError when quantile is not between 0 and 1
    Source: definition
    """

    names: ClassVar = ("activation_outlier_index",)
    log_interval: ClassVar = True
    nan: ClassVar = "the unit is always 0, or there are no rows"
    limits: ClassVar = {"quantile": (lambda quantile: 0 < quantile < 1, "it must be a share of the rows, between 0 and 1")}
    quantile: float = 0.999
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {"tails": Need(Quantiles, "output", self.view), "y": Need(Sizes, "output", self.view)}

    def __call__(self, weight: Tensor | None, tails: Quantiles, y: Sizes) -> Tensor:
        return _ratio(tails.quantile(self.quantile), y.absolute / y.n)

    def counts(self, weight: Tensor | None, tails: Quantiles, y: Sizes) -> dict[str, int]:
        return {"largest_value": int(y.n.double() * (1 - self.quantile) < 1)}


@dataclass(frozen=True)
class ActivationKurtosis(Metric):
    """Kurtosis of a unit's activation: how heavy its tails are. The value 3 of a Gaussian is not subtracted.

    Formula: m4 / m2^2, m_k = E (y - E y)^k, y the unit's output, E the mean over rows
    Shapes: y over rows of width units -> (units,)
    Unit:   none, >= 1. N(0, 1) rows: 3; two equally frequent values: 1; active in 1 of n rows, n large: about n
    NaN:    a constant unit; fewer than two rows
    Source: definition; Pearson 1905, Biometrika 4:169
    """

    names: ClassVar = ("activation_kurtosis",)
    coverage: ClassVar = "92 % at 16 samples (86 % without the logarithm), 93 % at 400, of a mixture of two Gaussians"
    nan: ClassVar = "the unit is constant, or there are fewer than two rows"
    log_interval: ClassVar = True
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Higher, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Higher) -> Tensor:
        return y.kurtosis.where(~constant(y.variance, y.mean), torch.nan)


@dataclass(frozen=True)
class ActivationMaxRatio(Metric):
    """Largest absolute activation of a unit relative to the median. It grows with the rows; the median is accurate to 1 %.

    Formula: max|y| / median|y|, y the unit's output
    Shapes: y over rows of width units -> (units,)
    Unit:   none, >= 1. 10,000 N(0, 1) rows: about 5.7; massive activations: 1,000 and more
    NaN:    a unit that is 0 in half of the rows; no rows
    Source: Sun et al. 2024, 2402.17762, section 2
    """

    names: ClassVar = ("activation_max_ratio",)
    nan: ClassVar = "the unit is 0 in half of the rows, or there are no rows"
    no_error: ClassVar = "it reads the largest value, which grows with the rows and which the jackknife has no error of"
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Quantiles, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Quantiles) -> Tensor:
        return _ratio(y.quantile(1.0), y.quantile(0.5))


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return above / below.where(below > 0, torch.nan)


@dataclass(frozen=True)
class ActivationZeroFraction(Metric):
    """Share of rows in which a unit does not fire, that is, is exactly zero behind the activation that follows its layer.

    The activation is found in a forward pass: it is the only operation that reads the layer's output, or the output of norms or
    pooling that do. Where there is none, the layer's own output is read, and the metadata says so (``read_behind``): before an
    activation, and behind smooth ones, the value is about 0.

    Formula: (number of rows with y = 0) / n, y the unit behind its activation in n rows
    Shapes: y over rows of width units -> (units,)
    Unit:   none, in [0, 1]. A dead unit behind a ReLU: 1; N(0, 1) rows before a ReLU: 0.5
    NaN:    no rows
    Source: definition; Hu et al. 2016, 1607.03250, eq. 1 (average percentage of zeros)
    """

    names: ClassVar = ("activation_zero_fraction", "zero_fraction")
    higher_is_better: ClassVar = False
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Zeros, "activated", self.view)}

    def __call__(self, weight: Tensor | None, y: Zeros) -> Tensor:
        return y.zeros / y.n.double()


@dataclass(frozen=True)
class ActivationCosine(Metric):
    """Mean cosine similarity of a unit with the other units, without centring: two units that are always active look similar.

    ``reduce: none`` gives the matrix, with diagonal 0. For a unit that is always 0 the cosine is undefined: its entries are NaN,
    the means of the other units leave it out, and ``zero`` counts it.

    Formula: mean over j != i of y_i.y_j / (|y_i| |y_j|), y_i the outputs of unit i in all rows, not centred
    Shapes: y over rows of width units -> (units,), or (units, units) with ``reduce: none``
    Unit:   none, in [-1, 1]; equal units 1, N(0, 1) rows about 0; after a ReLU 0.3183
    NaN:    the unit is always 0, or all other units are
    Source: definition
    """

    names: ClassVar = ("activation_cosine_similarity",)
    kind: ClassVar = "pair"
    nan: ClassVar = "the unit is always 0, or it has no partner"
    higher_is_better: ClassVar = False
    reduce: Literal["mean", "none"] = "mean"
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Gram, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Gram) -> Tensor:
        outer = y.about(shift=torch.zeros_like(y.shift)).outer
        size = outer.diagonal().clamp_min(0).sqrt()
        pairs = outer / size.where(size > 0, torch.nan).outer(size.where(size > 0, torch.nan))
        pairs.fill_diagonal_(0)
        if self.reduce == "none":
            return pairs
        live = size > 0
        return (pairs.nansum(1) / (live.sum() - 1)).where(live & (live.sum() > 1), torch.nan)

    def counts(self, weight: Tensor | None, y: Gram) -> dict[str, int]:
        return {"zero": int((y.about(shift=torch.zeros_like(y.shift)).outer.diagonal() <= 0).sum())}
