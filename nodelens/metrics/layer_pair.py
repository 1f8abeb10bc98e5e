"""Similarity of two layers, row by row."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nodelens.statistics import Cosines, Gram, Pair

from .base import Metric
from .covariances import constant_units
from .need import Need, View

UNPAIRED = 0.01  # of the rows: if more are valid in one layer only, sums over different rows would be compared


@dataclass(frozen=True)
class EdgeMetric(Metric):
    """One value per pair of layers over the same samples or positions: x is the first layer, y the next."""

    kind: ClassVar = "edge"
    nan: ClassVar = "fewer than two rows, or a layer without variance"
    view: View = "positions"

    def both(self, of: type[Gram] = Gram, pair: type[Pair] | None = Pair) -> dict[str, Need]:
        """One statistic of each layer, and one of their paired rows."""
        needs = {"x": Need(of, "output", self.view), "y": Need(of, "next", self.view)}
        return needs | ({"xy": Need(pair, "output", self.view, "next")} if pair else {})


def live_cross(x: Gram, y: Gram, xy: Pair) -> Tensor:
    """Covariances of units of two layers, (d_x, d_y): 0 for constant units, NaN below two rows and where ``unpaired``."""
    live = ~constant_units(x)[:, None] & ~constant_units(y)
    return xy.covariance.where(live, 0).where((xy.n > 1) & ~unpaired(x, y, xy), torch.nan)


def unpaired(x: Gram, y: Gram, xy: Pair) -> Tensor:
    """Whether more than 1 % of the rows are valid (finite) in one of the layers only, (1,) bool."""
    return x.n + y.n - 2 * xy.n > UNPAIRED * torch.maximum(x.n, y.n)


@dataclass(frozen=True)
class LayerCosine(EdgeMetric):
    """Mean cosine of a row and the same row of the next layer: near 1 where a residual block hardly changes the direction.

    Rows are not centred, and rows of length zero in either layer are left out. It is meaningful only where the layers share a
    basis, as in a residual stream.

    Formula: mean over rows of x.y/(|x| |y|)
    Shapes: x, y over rows of the same width -> ()
    Unit:   none, in [-1, 1]; equal rows: 1; unrelated centred rows: about 0
    NaN:    layers of different width; no row that is nonzero in both layers
    Source: Men et al. 2024, 2403.03853, eq. 1 (block influence, 1 minus this value)
    """

    names: ClassVar = ("layer_cosine_sim",)
    nan: ClassVar = "layers of different width, or no row that is nonzero in both layers"

    def needs(self) -> dict[str, Need]:
        return {"xy": Need(Cosines, "output", self.view, "next")}

    def __call__(self, weight: Tensor | None, xy: Cosines) -> Tensor:
        return xy.mean.squeeze()
