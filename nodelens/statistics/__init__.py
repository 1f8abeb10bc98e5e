"""Sums over rows, as values that add."""

from .base import Accumulator, Statistic
from .gram import ByClass, Cross, Gram
from .moments import Moments, Sizes, Zeros
from .patches import Maps, Patches

STATISTICS: tuple[type[Statistic], ...] = (Moments, Sizes, Zeros, Gram, Cross, ByClass, Patches)

__all__ = ["STATISTICS", "Accumulator", "ByClass", "Cross", "Gram", "Maps", "Moments", "Patches", "Sizes", "Statistic", "Zeros"]
