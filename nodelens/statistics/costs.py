"""What statistics take and which may stand in for which: for the plan."""

from .base import Statistic
from .by_class import ByClass, ClassCross, ClassGram, ClassSizes
from .gram import Cross, Gram
from .map_ranks import MapIndependence, MapRanks
from .moments import Higher, MeanSizes, Moments, Sizes, Zeros
from .norms import Directions, NormedGram
from .pair import Cosines, NormedPair, Pair
from .patches import PatchesByClass
from .position_power import PositionPower
from .quantiles import BINS, Quantiles
from .sample import ROWS, Sample
from .weight_sums import WeightSums

PAIRS = (Gram, NormedGram, Directions, Pair, NormedPair)  # products of units: square in the width
SQUARE = (*PAIRS, ClassGram)  # what grows with the square of the width
SAMPLED = (*PAIRS, Quantiles, Cosines)  # what reads a sample of each map's positions where one is asked for
_RICHER: dict[type[Statistic], tuple[type[Statistic], ...]] = {
    Moments: (Higher, Gram, NormedGram),
    Gram: (NormedGram,),
    Pair: (NormedPair,),
}


def serves(statistic: type[Statistic]) -> tuple[type[Statistic], ...]:
    """Statistics that hold all that one does, and more."""
    return _RICHER.get(statistic, ())


def adapt(value: Statistic, asked: type[Statistic]) -> Statistic:
    """What was asked for, of the value that serves it."""
    return value.moments if asked is Moments and isinstance(value, Gram) else value


def numbers(statistic: type[Statistic], width: int, beside: int, classes: int, groups: int = 1, positions: int = 1) -> int:
    """How many numbers of 8 bytes a statistic holds, for rows of a width with columns beside them.

    Exact, but for classes that do not occur, the highest at the end, and a sample of fewer rows than it has room for: then it
    holds less. beside: of WeightSums what a unit reads, with the groups of a convolution; of ClassCross the class and its targets.
    """
    d, t, k = width, beside, classes
    sizes = {
        Sizes: d + 1,
        Zeros: d + 1,
        MeanSizes: d + 1,
        Higher: 5 * d + 1,
        Quantiles: BINS * d + 1,
        Gram: d * d + 2 * d + 1,
        NormedGram: d * d + 3 * d + 2,
        Directions: d * d + 2 * d + 1,
        Cross: d * t + 2 * d + 2 * t + t * t + 1,
        Pair: d * t + 2 * d + 2 * t + 1,
        NormedPair: d * t + 3 * d + 3 * t + 4,
        Cosines: 2,
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
