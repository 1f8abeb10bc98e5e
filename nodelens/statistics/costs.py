"""The memory of each statistic, and which statistic contains another; used to plan a pass."""

from . import triangle
from .base import Statistic
from .bins import BINS
from .by_class import ByClass, ClassCross, ClassGram, ClassSizes
from .gram import Cross, Gram
from .located import Located
from .map_ranks import MapIndependence, MapRanks
from .moments import Higher, MeanSizes, Moments, Sizes, Zeros
from .norms import Directions, NormedGram
from .pair import Cosines, NormedPair, Pair
from .patches import PatchesByClass
from .position_power import PositionPower
from .products import Products
from .quantiles import Quantiles
from .sample import ROWS, Sample
from .weight_sums import WeightSums

PAIRS = (Gram, NormedGram, Directions, Pair, NormedPair, Products)  # products of units: quadratic in the width
SQUARE = (*PAIRS, ClassGram)  # all statistics whose memory is quadratic in the width
SAMPLED = (*PAIRS, Quantiles, Cosines)  # computed from sampled positions of each map if the plan asks for it
_SUPERSETS: dict[type[Statistic], tuple[type[Statistic], ...]] = {
    Moments: (Higher, Gram, NormedGram),
    Gram: (NormedGram,),
    Pair: (NormedPair,),
}


def supersets_of(statistic: type[Statistic]) -> tuple[type[Statistic], ...]:
    """Statistics that contain all sums of the given one."""
    return _SUPERSETS.get(statistic, ())


def adapt(value: Statistic, asked: type[Statistic]) -> Statistic:
    """The requested statistic, extracted from one that contains it."""
    return value.moments if asked is Moments and isinstance(value, Gram) else value


def numbers(statistic: type[Statistic], width: int, target_width: int, classes: int, groups: int = 1, positions: int = 1) -> int:
    """How many numbers of 8 bytes a statistic holds, for rows of a width with a paired target.

    Exact, except that less is held if the highest classes do not occur, a ``Sample`` has fewer than ROWS rows, or the counts of
    ``Quantiles`` fit in fewer bytes and bins.
    target_width: columns of the target; the fan-in for WeightSums (with the groups of a convolution); 1 + targets for ClassCross.
    """
    d, t, k = width, target_width, classes
    sizes = {
        Sizes: d + 1,
        Zeros: d + 1,
        MeanSizes: d + 1,
        Higher: 5 * d + 1,
        Quantiles: (BINS + 1) * d + 2,
        Gram: triangle.size(d) + 3 * d + 1,
        NormedGram: triangle.size(d) + 4 * d + 2,
        Directions: triangle.size(d) + 3 * d + 1,
        Cross: d * t + 2 * d + 2 * t + t * t + 1,
        Pair: d * t + 2 * d + 2 * t + 1,
        NormedPair: d * t + 3 * d + 3 * t + 4,
        Cosines: 2,
        Products: d * d + 2,
        Located: (d + 1) * positions + d,
        ByClass: k * (2 * d + 1) + d,
        PatchesByClass: k * (2 * d + 1) + d,
        ClassSizes: k * (d + 1),
        ClassGram: k * (d * d + d + 1) + d,
        ClassCross: k * (2 * d + 2 * (t - 1) + d * (t - 1) + 1) + d + t - 1,
        Sample: ROWS * (d + t + 1) + 1,
        WeightSums: 2 * d * t + groups * t + 1,
        PositionPower: (d + 1) * positions,
        MapRanks: d + 1,
        MapIndependence: d + 1,
    }
    return sizes.get(statistic, 3 * d + 1)  # moments, of rows or of patches
