"""Sums over rows, stored as immutable values that can be added."""

from .base import Accumulator, Statistic
from .by_class import ByClass, ClassCross, ClassGram, ClassSizes, ClassStatistic
from .gram import Cross, Gram
from .located import Located
from .moments import Higher, MeanSizes, Moments, Sizes, Zeros
from .norms import Directions, NormedGram
from .pair import Cosines, NormedPair, Pair
from .patches import Patches, PatchesByClass
from .products import Products
from .quantiles import Quantiles
from .sample import Sample

STATISTICS: tuple[type[Statistic], ...] = (
    Moments,
    Higher,
    Sizes,
    MeanSizes,
    Zeros,
    Quantiles,
    Gram,
    NormedGram,
    Directions,
    Cross,
    Pair,
    NormedPair,
    Cosines,
    Products,
    Located,
    ByClass,
    ClassSizes,
    ClassGram,
    ClassCross,
    Patches,
    PatchesByClass,
    Sample,
)

__all__ = [
    "STATISTICS",
    "Accumulator",
    "ByClass",
    "ClassCross",
    "ClassGram",
    "ClassSizes",
    "ClassStatistic",
    "Cosines",
    "Cross",
    "Directions",
    "Gram",
    "Higher",
    "Located",
    "MeanSizes",
    "Moments",
    "NormedGram",
    "NormedPair",
    "Pair",
    "Patches",
    "PatchesByClass",
    "Products",
    "Quantiles",
    "Sample",
    "Sizes",
    "Statistic",
    "Zeros",
]
