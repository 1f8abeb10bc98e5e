"""Associations: how the units of a layer hang together, by their activations, by their inputs and by what they change."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nodelens.network.layers import ASSOCIATION
from nodelens.statistics import Gram
from nodelens.statistics.products import Products

from .base import Metric
from .derivative import Derivative
from .need import Need, View


@dataclass(frozen=True)
class _Association(Metric):
    """Shared by associations: symmetric, signed matrices of pairs of units. ``normalize``: A_ij / sqrt(A_ii A_jj)."""

    kind: ClassVar = "pair"
    matrix_errors: ClassVar = True
    nan: ClassVar = "no rows, or, normalized, a unit whose own entry is not above 0"
    normalize: bool = False

    def __call__(self, weight: Tensor | None, **sums: Any) -> Tensor:
        a = self.matrix(**sums)
        return _normalized(a) if self.normalize else a

    def matrix(self, **sums: Any) -> Tensor:
        """The association before it is normalized, (units, units)."""
        raise NotImplementedError

    def counts(self, weight: Tensor | None, **sums: Any) -> dict[str, int]:
        return {"zero_units": int((self.matrix(**sums).diagonal() == 0).sum())}


@dataclass(frozen=True)
class ForwardCovariance(_Association):
    """Covariance of the activations of two units: large and positive where they are active together.

    ``view: positions`` takes each position of a map and each token as a row; ``samples`` takes the mean of each sample.

    Formula: E[(h_i - E h_i)(h_j - E h_j)], h the units' values, E the mean over rows (``ddof: 0``)
    Shapes: h over rows of width units -> (units, units)
    Unit:   that of h squared
    NaN:    no rows
    Source: Lange, Rolnick & Kording 2022, Clustering units in neural networks: upstream vs downstream information, TMLR
    """

    names: ClassVar = ("forward_cov",)
    presets: ClassVar = {"forward_cov_norm": {"normalize": True}}
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {"h": Need(Gram, "output", self.view)}

    def matrix(self, h: Gram) -> Tensor:
        mean = h.total / h.n
        return h.outer / h.n - mean.outer(mean)


@dataclass(frozen=True)
class _OfDerivatives(_Association):
    def derivative(self) -> Derivative:
        raise NotImplementedError

    def needs(self) -> dict[str, Need]:
        return {"p": Need(Products, ASSOCIATION, options=(self.derivative(),))}

    def matrix(self, p: Products) -> Tensor:
        return p.mean


@dataclass(frozen=True)
class BackwardJacobian(_OfDerivatives):
    """Downstream sensitivity: large where two units move the predictions in the same direction.

    Exact: one backward pass per prediction, for all layers at once.

    Formula: E[J'J], J = dz/dh, z the predictions of a row's sample, h the units' values, E the mean over rows
    Shapes: J (predictions, units) for each row -> (units, units)
    Unit:   that of z squared over that of h squared
    NaN:    no rows
    Source: Lange, Rolnick & Kording 2022, Clustering units in neural networks: upstream vs downstream information, TMLR
    """

    names: ClassVar = ("backward_jac",)
    presets: ClassVar = {"backward_jac_norm": {"normalize": True}}

    def derivative(self) -> Derivative:
        return Derivative("predictions", "exact")


@dataclass(frozen=True)
class BackwardGGN(_OfDerivatives):
    """Generalised Gauss-Newton matrix of the loss with respect to the units: the Fisher information of the units.

    Formula: E[J'(diag p - p p')J], J = dz/dh, z the logits, p their softmax, h the units' values, E the mean over rows
    Shapes: J (predictions, units) for each row -> (units, units)
    Unit:   that of the loss over that of h squared
    NaN:    no rows
    Source: Martens 2020, 1412.1193, eq. 9; Lange, Rolnick & Kording 2022, TMLR
    """

    names: ClassVar = ("backward_ggn",)
    presets: ClassVar = {"backward_ggn_norm": {"normalize": True}}
    curvature: Literal["auto", "exact", "sampled", "empirical"] = "auto"
    draws: int = 4

    def derivative(self) -> Derivative:
        return Derivative("curvature", "exact")


def _normalized(a: Tensor) -> Tensor:
    """A_ij / sqrt(A_ii A_jj); NaN where either diagonal entry is not positive."""
    d = a.diagonal()
    size = d.where(d > 0, torch.nan).sqrt()
    return a / size.outer(size)
