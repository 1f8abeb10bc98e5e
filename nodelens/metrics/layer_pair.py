"""How two layers compare, row by row: what an edge metric is, and the mean cosine."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nodelens.statistics import Cosines, Gram, Pair

from .base import Metric
from .information import silent
from .need import Need, View


@dataclass(frozen=True)
class EdgeMetric(Metric):
    """One value for two layers whose rows are the same samples or positions: x the first layer's, y the next one's."""

    kind: ClassVar = "edge"
    nan: ClassVar = "fewer than two rows, or a layer without variance"
    view: View = "positions"

    def both(self, of: type[Gram] = Gram, pair: type[Pair] | None = Pair) -> dict[str, Need]:
        """A statistic of either layer, and one of the two side by side."""
        needs = {"x": Need(of, "output", self.view), "y": Need(of, "next", self.view)}
        return needs | ({"xy": Need(pair, "output", self.view, "next")} if pair else {})


def live_cross(x: Gram, y: Gram, xy: Pair) -> Tensor:
    """Covariance of one layer's units with the other's, (d_x, d_y), 0 for units that do not vary; NaN below two rows."""
    return xy.covariance.where(~silent(x)[:, None] & ~silent(y), 0).where(xy.n > 1, torch.nan)


@dataclass(frozen=True)
class LayerCosine(EdgeMetric):
    """Mean cosine of a row with the same row of the next layer: how little a residual block turns it.

    Rows are not centred; a row of length zero on either side is left out. Means something where the two layers share a
    basis, as a residual stream does.

    Formula: mean over rows of x.y/(|x| |y|)
    Shapes: x, y over rows of the same width -> ()
    Unit:   none, in [-1, 1]; equal rows 1, unrelated and centred about 0
    NaN:    layers of different width; no row that is not zero on both sides
    Source: Men et al. 2024, 2403.03853, eq. 1 (block influence, 1 - this)
    """

    names: ClassVar = ("layer_cosine_sim",)
    nan: ClassVar = "layers of different width, or no row that is not zero on both sides"

    def needs(self) -> dict[str, Need]:
        return {"xy": Need(Cosines, "output", self.view, "next")}

    def __call__(self, weight: Tensor | None, xy: Cosines) -> Tensor:
        return xy.mean.squeeze()


METRICS: tuple[type[Metric], ...] = (LayerCosine,)
