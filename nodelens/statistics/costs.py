"""What statistics take and which may stand in for which: for the plan."""

from .base import Statistic
from .by_class import ByClass, ClassCross, ClassGram, ClassSizes
from .gram import Cross, Gram
from .moments import Higher, MeanSizes, Moments, Sizes, Zeros
from .norms import Directions, NormedGram
from .pair import Cosines, NormedPair, Pair
from .patches import PatchesByClass
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


def numbers(statistic: type[Statistic], width: int, beside: int, classes: int) -> int:
    """How many numbers a statistic holds, for rows of a width with columns beside them."""
    d, t, k = width, beside, classes
    sizes = {
        Sizes: d,
        Zeros: d,
        MeanSizes: d,
        Moments: 3 * d,
        Higher: 5 * d,
        Quantiles: BINS * d,
        Gram: d * d + 2 * d,
        NormedGram: d * d + 3 * d,
        Directions: d * d + 2 * d,
        Cross: d * t + 2 * d + 2 * t + t * t,
        Pair: d * t + 2 * d + 2 * t,
        NormedPair: d * t + 3 * d + 3 * t,
        Cosines: 2,
        ByClass: 2 * k * d + d,
        PatchesByClass: 2 * k * d + d,
        ClassSizes: k * d,
        ClassGram: k * (d * d + d) + d,
        ClassCross: k * (2 * d + 3 * t + d * t),
        Sample: ROWS * (d + t + 1),
        WeightSums: 3 * d * d,
    }
    return sizes.get(statistic, 3 * d)
