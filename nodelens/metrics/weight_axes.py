"""How a unit's weights lie to the principal axes of its inputs."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nodelens.statistics import Gram

from .base import Metric
from .covariances import axes_of
from .need import Need

_NAN = "the weights are all zero, the input does not vary, or the weights are those of patches (a kernel, or groups)"


@dataclass(frozen=True)
class _OfAxes(Metric):
    """Shared by functions of weights and the eigenvectors of the covariance of the input channels."""

    weighted: ClassVar = True
    nan: ClassVar = _NAN

    def needs(self) -> dict[str, Need]:
        return {"x": Need(Gram, "input")}

    def __call__(self, weight: Tensor, x: Gram) -> Tensor:
        w = weight.double()
        if w.shape[1] != len(x.shift):  # the covariance of patches is not kept
            return w.new_full((len(w),), torch.nan)
        eigenvalues, axes = axes_of(x, False)
        length = torch.linalg.vector_norm(w, dim=1)
        value = self.along(w @ axes / length[:, None], eigenvalues)
        return value.where((length > 0) & (eigenvalues[0] > 0), torch.nan)

    def along(self, cosines: Tensor, eigenvalues: Tensor) -> Tensor:
        """The value from the cosines of the weights with the axes, (units, d), and their variances, (d,), largest first."""
        raise TypeError(f"{type(self).__name__} has no formula")


@dataclass(frozen=True)
class SpectralAlignment(_OfAxes):
    """How strongly a unit's weights lie along the leading axes of the input, weighted by the variance along each.

    It exceeds the Rayleigh quotient in its preference for the first axes: variances count squared. Linear layers and 1x1
    convolutions only, because it reads the covariance of the input channels.

    Formula: sqrt(sum_k lam_k^2 cos(w, v_k)^2 / sum_k lam_k), lam_k, v_k the leading eigenpairs of the inputs' covariance
    Shapes: weight (units, d), x over rows of width d -> (units,)
    Unit:   that of x, >= 0; white input of variance s^2: s/sqrt(d); weights along the only axis: sqrt(lam_1)
    NaN:    weights that are all zero; an input that does not vary; kernels and groups
    Raises: ValueError when n_components is below 1
    Source: definition
    """

    names: ClassVar = ("spectral_alignment",)
    limits: ClassVar = {"n_components": (lambda k: k is None or k >= 1, "it takes 1 or more axes, or None for all")}
    n_components: int | None = None

    def along(self, cosines: Tensor, eigenvalues: Tensor) -> Tensor:
        lam, cosines = eigenvalues[: self.n_components], cosines[:, : self.n_components]
        return ((cosines * lam).square().sum(1) / lam.sum()).sqrt()


@dataclass(frozen=True)
class WeightActivationAlignment(_OfAxes):
    """The largest absolute cosine of a unit's weights with one of the leading principal axes of its input.

    Axes whose eigenvalues are nearly equal are arbitrary, and so is the value then. Axes without variance are left out. Linear
    layers and 1x1 convolutions only, because it reads the covariance of the input channels.

    Formula: max over k of |cos(w, v_k)|, v_k the n_components leading eigenvectors of the input covariance
    Shapes: weight (units, d), x over rows of width d -> (units,)
    Unit:   none, in [0, 1]; weights along one of the axes: 1; a random direction: about sqrt(2 ln(n_components) / d)
    NaN:    weights that are all zero; an input that does not vary; kernels and groups
    Raises: ValueError when n_components is below 1
    Source: definition
    """

    names: ClassVar = ("weight_activation_alignment",)
    limits: ClassVar = {"n_components": (lambda k: k >= 1, "it takes 1 or more axes")}
    n_components: int = 5

    def along(self, cosines: Tensor, eigenvalues: Tensor) -> Tensor:
        known = cosines[:, : self.n_components].abs() * (eigenvalues[: self.n_components] > 0)
        return known.amax(1).clamp_max(1)
