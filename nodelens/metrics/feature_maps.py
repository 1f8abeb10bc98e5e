"""Pruning criteria from whole feature maps: the ranks of maps, and how much each map adds to the others."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nodelens.network.group_layer import GroupLayer
from nodelens.statistics.map_ranks import MapIndependence, MapRanks

from .base import Metric
from .need import Need


@dataclass(frozen=True)
class HRank(Metric):
    """Mean rank of a unit's feature maps: maps of low rank carry little information.

    Maps are read at full resolution where the unit is consumed, after its activation. All data are used (the paper uses a few
    hundred images).

    Formula: E_n rank(x_u), x_u the H x W map; a singular value counts above max(H, W) eps s_max, eps that of the maps' dtype
    Shapes: x (samples, units, H, W), the input of the first two-dimensional convolution that reads the units -> (units,)
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
                f"{name} needs feature maps: group {group.title!r} is read by {kinds}, by no two-dimensional convolution; leave "
                "it out with freeze="
            )


@dataclass(frozen=True)
class Chip(HRank):
    """Channel independence: the nuclear norm that a sample's feature maps lose without the map of the unit.

    Maps are read as in ``hrank``, over all data.

    Formula: E_n (||A||_* - ||A with row u zeroed||_*), A (units, H W) the sample's maps; norms from eigenvalues of A'A or AA'
    Shapes: x (samples, units, H, W), the input of the first two-dimensional convolution that reads the units -> (units,)
    Unit:   that of x, >= 0
    NaN:    never
    Raises: ValueError where no two-dimensional convolution reads the units, or maps are one pixel high or wide
    Source: Sui et al. 2021, 2110.13981, eq. 4
    """

    names: ClassVar = ("chip",)
    statistic: ClassVar[type[MapRanks]] = MapIndependence
