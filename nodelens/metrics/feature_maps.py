"""Pruning criteria of whole feature maps: their ranks, and how much each adds to the others."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nodelens.network.group_layer import GroupLayer
from nodelens.statistics.map_ranks import MapIndependence, MapRanks

from .base import Metric
from .need import Need


@dataclass(frozen=True)
class HRank(Metric):
    """Mean rank of a unit's feature maps: a map of low rank holds what few rows and columns hold.

    Maps are read at full resolution where the unit is consumed, after its activation; all data count (the paper takes a few
    hundred images).

    Formula: E_n rank(x_u), x_u the H x W map; a singular value counts above max(H, W) eps s_max, eps the maps' own precision
    Shapes: x (samples, units, H, W) of what the first two-dimensional convolution reads -> (units,)
    Unit:   none, in [0, min(H, W)]
    NaN:    never
    Raises: ValueError where no two-dimensional convolution reads the units, or maps are one pixel high or wide
    Source: Lin et al. 2020, 2002.10179, eq. 5
    """

    names: ClassVar = ("hrank",)
    reads_consumers: ClassVar = True
    statistic: ClassVar[type[MapRanks]] = MapRanks

    def needs(self) -> dict[str, Need]:
        return {"maps": Need(self.statistic, "maps")}

    def __call__(self, weight: Tensor | None, maps: MapRanks) -> Tensor:
        return maps.total / maps.n

    def check_group(self, name: str, group: GroupLayer) -> None:
        if group.image_reader is None:
            readers = [m.piece.module for m in group.readers]
            kinds = ", ".join(f"{path or 'the model'} ({type(group.module.get_submodule(path)).__name__})" for path in readers)
            raise ValueError(
                f"{name} wants maps: group {group.title!r} is read by {kinds}, by no two-dimensional convolution; leave it out "
                "with freeze="
            )


@dataclass(frozen=True)
class Chip(HRank):
    """Channel independence: what the nuclear norm of all feature maps loses without the unit's.

    Maps are read as in ``hrank``; all data count.

    Formula: E_n (||A||_* - ||A with row u zeroed||_*), A (units, H W) the sample's maps; norms from eigenvalues of A'A or AA'
    Shapes: x (samples, units, H, W) of what the first two-dimensional convolution reads -> (units,)
    Unit:   that of x, >= 0
    NaN:    never
    Raises: ValueError where no two-dimensional convolution reads the units, or maps are one pixel high or wide
    Source: Sui et al. 2021, 2110.13981, eq. 4
    """

    names: ClassVar = ("chip",)
    statistic: ClassVar[type[MapRanks]] = MapIndependence


METRICS: tuple[type[Metric], ...] = (HRank, Chip)
