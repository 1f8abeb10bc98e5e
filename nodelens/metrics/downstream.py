"""Information that a unit carries about the next layer."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nodelens.statistics import Gram, Moments, Pair
from nodelens.statistics.linalg import MI_CEILING, constant, gaussian_information

from .base import Metric
from .information import PairwiseRedundancy
from .need import Need, View


@dataclass(frozen=True)
class DownstreamImportance(Metric):
    """Gaussian mutual information of a unit with a unit of the next layer, averaged over ALL units of that layer.

    Constant units of either layer contribute 0; ``constant`` counts those of this layer and ``saturated`` the pairs at the upper
    limit. Independent units give about 1/(2n) rather than 0.

    Formula: mean_j -0.5 ln(1 - rho_ij^2), rho_ij = corr(y_i, z_j), y this layer's units, z the next one's
    Shapes: y over rows of width units, z over the same rows of width t -> (units,)
    Unit:   nats, in [0, 6.908]; all rho = 0.6: 0.2231
    NaN:    fewer than two rows
    Source: Cover & Thomas 2006, Elements of Information Theory, ch. 8
    """

    names: ClassVar = ("downstream_importance",)
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {  # variances over the same rows as the products, even where these are a sample of the positions
            "y": Need(Gram, "output", self.view),
            "z": Need(Gram, "next", self.view),
            "yz": Need(Pair, "output", self.view, "next"),
        }

    def __call__(self, weight: Tensor | None, y: Gram, z: Gram, yz: Pair) -> Tensor:
        return gaussian_information(_squared(y.moments, z.moments, yz)).mean(1)

    def counts(self, weight: Tensor | None, y: Gram, z: Gram, yz: Pair) -> dict[str, int]:
        saturated = int((_squared(y.moments, z.moments, yz) >= MI_CEILING).sum())
        return {"constant": int(constant(y.moments.variance, y.mean).sum()), "saturated": saturated}


def _squared(y: Moments, z: Moments, yz: Pair) -> Tensor:
    """Squared correlations of one layer's units with the next one's, (units, t)."""
    live = ~constant(y.variance, y.mean)[:, None] & ~constant(z.variance, z.mean)
    rho = yz.covariance / y.variance.sqrt()[:, None] / z.variance.sqrt()
    return rho.square().where(live, 0).where(yz.n > 1, torch.nan)


@dataclass(frozen=True)
class TransitionEfficiency(Metric):
    """Information of a unit about the next layer, discounted by its redundancy within its own layer.

    Formula: downstream_importance_i/(1 + redundancy_i), redundancy_i the mean information with the other units of its layer
    Shapes: y over rows of width units, z over the same rows of width t -> (units,)
    Unit:   nats, in [0, 6.908]; rho = 0.6 with all units of both layers: 0.1824
    NaN:    fewer than two rows, or a layer of one unit
    Source: Cover & Thomas 2006, Elements of Information Theory, ch. 8, for both informations
    """

    names: ClassVar = ("layer_transition_efficiency",)
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return DownstreamImportance(view=self.view).needs()

    def __call__(self, weight: Tensor | None, y: Gram, z: Gram, yz: Pair) -> Tensor:
        information = DownstreamImportance()(weight, y=y, z=z, yz=yz)
        return information / (1 + PairwiseRedundancy()(weight, y=y))
