"""What a unit tells about the next layer."""

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
    """Mean Gaussian information of a unit with each unit of the next layer, over ALL of them.

    A unit that does not vary, here or there, tells nothing: 0, counted as ``constant`` (here); pairs at the ceiling as
    ``saturated``. Independent units read about 1/(2n), not 0.

    Formula: mean_j -0.5 ln(1 - rho_ij^2), rho_ij = corr(y_i, z_j), y this layer's units, z the next one's
    Shapes: y over rows of width units, z over the same rows of width t -> (units,)
    Unit:   nats, in [0, 6.908]; all rho = 0.6: 0.2231
    NaN:    fewer than two rows
    Source: Cover & Thomas 2006, Elements of Information Theory, ch. 8
    """

    names: ClassVar = ("downstream_importance",)
    nan: ClassVar = "fewer than two rows"
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {  # variances of the very rows that the products are of, also where these are a sample of the positions
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
    """What a unit tells the next layer, less the more its own layer's units tell it too.

    Formula: downstream_importance_i/(1 + redundancy_i), the second the mean information with the partners in its layer
    Shapes: y over rows of width units, z over the same rows of width t -> (units,)
    Unit:   nats, in [0, 6.908]; rho = 0.6 with all of both: 0.1824
    NaN:    fewer than two rows, or a layer of one unit, which has no partners
    Source: Cover & Thomas 2006, Elements of Information Theory, ch. 8, for both informations
    """

    names: ClassVar = ("layer_transition_efficiency",)
    nan: ClassVar = "fewer than two rows, or a layer of one unit"
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return DownstreamImportance(view=self.view).needs()

    def __call__(self, weight: Tensor | None, y: Gram, z: Gram, yz: Pair) -> Tensor:
        told = DownstreamImportance()(weight, y=y, z=z, yz=yz)
        return told / (1 + PairwiseRedundancy()(weight, y=y))


METRICS: tuple[type[Metric], ...] = (DownstreamImportance, TransitionEfficiency)
