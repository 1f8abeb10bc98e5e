"""Associations: how the units of a layer hang together, by their activations, by their inputs and by what they change."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nodelens.network.layers import ASSOCIATION
from nodelens.statistics import Gram
from nodelens.statistics.located import Located
from nodelens.statistics.products import Products

from .base import Metric
from .derivative import Derivative
from .need import Need, View

PROBES = 32  # random vectors where no number is given


@dataclass(frozen=True)
class _Association(Metric):
    """Shared by associations: symmetric, signed matrices of pairs of units.

    normalize: A_ij / sqrt(A_ii A_jj). stacked: also one matrix of the units of all chosen layers, as the layer ``all``.
    """

    kind: ClassVar = "pair"
    matrix_errors: ClassVar = True
    nan: ClassVar = "no rows, or, normalized, a unit whose own entry is not above 0"
    normalize: bool = False
    stacked: bool = False

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

    ``view: positions`` takes each position of a map and each token as a row, ``samples`` the mean of each sample. ``spatial:
    per_location`` takes the covariance over samples at each position, and averages over positions: the mean map does not count.

    Formula: E[(h_i - m_i)(h_j - m_j)], h the units' values, E the mean over rows, m = E h (``ddof: 0``), or h's mean at a position
    Shapes: h over rows of width units -> (units, units)
    Unit:   that of h squared
    NaN:    no rows; normalized, a unit that does not vary
    Raises: ValueError for spatial: per_location with view: samples, with drawn positions, or stacked
    Source: Lange, Rolnick & Kording 2022, Clustering units in neural networks: upstream vs downstream information, TMLR
    """

    names: ClassVar = ("forward_cov",)
    presets: ClassVar = {"forward_cov_norm": {"normalize": True}}
    view: View = "positions"
    spatial: Literal["pooled", "per_location"] = "pooled"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spatial == "per_location" and (self.view == "samples" or self.stacked):
            other = "stacked" if self.stacked else "view=samples"
            raise ValueError(f"{self.names[0]}: spatial=per_location needs the positions of one layer; leave out {other}")

    def needs(self) -> dict[str, Need]:
        located = {"at": Need(Located, "output", "positions")} if self.spatial == "per_location" else {}
        return {"h": Need(Gram, "output", self.view), **located}

    def stacked_needs(self) -> dict[str, Need]:
        return {"h": Need(Gram, ASSOCIATION, options=(Derivative("values", "exact"),))}

    def matrix(self, h: Gram, at: Located | None = None) -> Tensor:
        if at is not None:
            return (h.about(torch.zeros_like(h.shift)).outer - at.about(torch.zeros_like(at.shift)).outer) / h.n
        mean = h.total / h.n
        return h.outer / h.n - mean.outer(mean)


@dataclass(frozen=True)
class _OfDerivatives(_Association):
    """Shared by associations of derivatives."""

    lacks: ClassVar = {
        "view": "positions have derivatives of their own, and the mean of these is the derivative of no unit; forward_cov has view",
        "spatial": "it is the mean over positions of products that are not centred; forward_cov has spatial",
    }

    def derivative(self) -> Derivative:
        """What is differentiated, and how."""
        raise NotImplementedError

    def needs(self) -> dict[str, Need]:
        return {"p": Need(Products, ASSOCIATION, options=(self.derivative(),))}

    def stacked_needs(self) -> dict[str, Need]:
        return self.needs()

    def matrix(self, p: Products) -> Tensor:
        return p.mean

    def beside(self, weight: Tensor | None, p: Products) -> dict[str, Tensor]:
        """``_probe_se``: the standard error over random vectors, given these data; nothing where none are drawn."""
        if len(p.outer) < 2:
            return {}
        folds, m = p.by_fold, p.vectors.double()
        each = torch.stack([_normalized(a) for a in folds]) if self.normalize else folds
        spread = (m[:, None, None] * (each - self(weight, p=p)).square()).sum(0)
        return {"_probe_se": (spread / (m.sum() * (len(m) - 1))).sqrt()}


@dataclass(frozen=True)
class _Probed(_OfDerivatives):
    """Shared by associations that random vectors can estimate. ``probes``: how many; with ``method: auto``, 0 is for exact."""

    method: Literal["auto", "exact", "hutchinson"] = "auto"
    probes: int = 0
    of: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probes < 0 or (self.probes and self.method == "exact"):
            way_out = "0 or more" if self.probes < 0 else "left out where method=exact, which draws none"
            raise ValueError(f"{self.names[0]}: probes is {self.probes}; it is {way_out}")

    def derivative(self) -> Derivative:
        if self.probes or self.method == "hutchinson":
            return Derivative(self.of, "probes", self.probes or PROBES)  # type: ignore[arg-type]
        return Derivative(self.of, "exact" if self.method == "exact" else "auto")  # type: ignore[arg-type]


@dataclass(frozen=True)
class ForwardJacobian(_Probed):
    """Upstream sensitivity: large where two units react to the same changes of the model's inputs.

    Inputs are the floating-point tensors that the model is called with, or the output of its first embedding. Exact up to 1,024
    inputs (or units in front of which a Linear alone reads the inputs), else estimated with 32 random vectors. ``probes`` sets
    their number; ``<name>_probe_se`` is then the standard error of the estimate, given the data.

    Formula: E[J J'], J = dh/dx, h the units' values of a row, x the inputs of its sample, E the mean over rows
    Shapes: J (units, inputs) for each row -> (units, units)
    Unit:   that of h squared over that of x squared
    NaN:    no rows; normalized, a unit that no input moves
    Raises: ValueError for probes below 0, or with method: exact
    Source: Lange, Rolnick & Kording 2022, Clustering units in neural networks: upstream vs downstream information, TMLR
    """

    names: ClassVar = ("forward_jac",)
    presets: ClassVar = {"forward_jac_norm": {"normalize": True}}
    of: ClassVar[str] = "inputs"


@dataclass(frozen=True)
class BackwardJacobian(_Probed):
    """Downstream sensitivity: large where two units move the predictions in the same direction.

    Exact up to 128 predictions per sample: one backward pass per prediction, for all layers at once. Else estimated with 32 random
    vectors. ``probes`` sets their number; ``<name>_probe_se`` is then the standard error of the estimate, given the data.

    Formula: E[J'J], J = dz/dh, z all predictions of a row's sample, h the units' values, E the mean over rows
    Shapes: J (predictions, units) for each row -> (units, units)
    Unit:   that of z squared over that of h squared
    NaN:    no rows; normalized, a unit that moves no prediction
    Raises: ValueError for probes below 0, or with method: exact
    Source: Lange, Rolnick & Kording 2022, Clustering units in neural networks: upstream vs downstream information, TMLR
    """

    names: ClassVar = ("backward_jac",)
    presets: ClassVar = {"backward_jac_norm": {"normalize": True}}
    of: ClassVar[str] = "predictions"


@dataclass(frozen=True)
class BackwardGGN(_OfDerivatives):
    """Gauss-Newton matrix of the loss with respect to the units, which is the Fisher information of the model's own labels.

    ``curvature: exact`` takes one backward pass per prediction, for all layers at once. ``sampled`` takes one for each of ``draws``
    labels drawn from the model: an unbiased estimate, with ``<name>_probe_se``. ``empirical`` takes one for the labels of the data,
    which is another matrix. ``auto`` is exact up to 64 predictions per sample, else sampled. Labels say which predictions count;
    without labels, all do.

    Formula: E[J'(diag p - p p')J], J = dz/dh, z the logits, p their softmax, h the units' values, E the mean over rows; for labels
             that are yes or no, or numbers, the second derivative of that loss in place of diag p - p p'
    Shapes: J (predictions, units) for each row -> (units, units)
    Unit:   that of the loss over that of h squared
    NaN:    no rows; normalized, a unit that moves no prediction
    Raises: ValueError for draws below 1
    Source: Martens 2020, 1412.1193, eq. 9; empirical: Kunstner et al. 2019, 1905.12558; Lange, Rolnick & Kording 2022, TMLR
    """

    names: ClassVar = ("backward_ggn",)
    presets: ClassVar = {"backward_ggn_norm": {"normalize": True}}
    limits: ClassVar = {"draws": (lambda draws: draws >= 1, "it is 1 or more labels per prediction")}
    curvature: Literal["auto", "exact", "sampled", "empirical"] = "auto"
    draws: int = 4

    def derivative(self) -> Derivative:
        return Derivative("loss", self.curvature, self.draws if self.curvature in ("auto", "sampled") else 0)


@dataclass(frozen=True)
class BackwardHessian(_Probed):
    """Hessian of the loss with respect to the units: how they bend the loss together.

    Where the network behind the layer is piecewise linear (Linear, convolution, ReLU, pooling, batch norm) and the loss is a
    cross-entropy, this is backward_ggn, which ``method: auto`` computes. The operations are read off the graph of one forward
    pass; elsewhere it takes one product with the Hessian per unit and position, up to 4,096, and is left out beyond. ``hutchinson``
    estimates it with random signs; ``<name>_probe_se`` is then the standard error of the estimate, given the data.

    Formula: E[d^2 L / dh dh'], L the loss summed over a row's sample, h the units' values, E the mean over rows
    Shapes: one (units, units) for each row -> (units, units)
    Unit:   that of the loss over that of h squared
    NaN:    no rows; normalized, a unit whose own entry is not above 0
    Raises: ValueError for probes below 0, or with method: exact
    Source: Lange, Rolnick & Kording 2022, TMLR; identity: Martens 2020, 1412.1193, section 8.1
    """

    names: ClassVar = ("backward_hess",)
    presets: ClassVar = {"backward_hess_norm": {"normalize": True}}
    of: ClassVar[str] = "hessian"


def _normalized(a: Tensor) -> Tensor:
    """A_ij / sqrt(A_ii A_jj); NaN where either diagonal entry is not positive."""
    d = a.diagonal()
    size = d.where(d > 0, torch.nan).sqrt()
    return a / size.outer(size)
