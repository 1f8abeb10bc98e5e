"""The types of units in a column, and sets of units of one type."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from nodelens.analysis.clusters.unit_types import NONE
from nodelens.statistics.sample_hash import generator

ANY = "any"  # random units of the layer, whatever their type
QUARTERS = ("lowest quarter", "second quarter", "third quarter", "highest quarter")


def kinds_of(column: pd.Series) -> pd.Series:
    """The type of each unit as a word: of words, booleans and integers their own; of other numbers the quarter of the layer.

    Units without a value are of the type ``none``.
    """
    if pd.api.types.is_bool_dtype(column):
        return column.map({True: f"{column.name}", False: f"not {column.name}"})
    if pd.api.types.is_integer_dtype(column) or not pd.api.types.is_numeric_dtype(column):
        words = column.astype(object).where(column.notna(), NONE)
        return words.map(str)
    ranks = column.groupby(level="layer").rank(pct=True, method="first")
    places = (ranks * len(QUARTERS)).apply(np.ceil).sub(1).clip(0, len(QUARTERS) - 1)
    return places.map(lambda place: NONE if np.isnan(place) else QUARTERS[int(place)])


def drawn_sets(units: Sequence[int], count: int, draws: int, seed: int, *words: str) -> list[list[int]]:
    """``draws`` sets of ``count`` units, drawn from the seed; a larger count of the same draw holds the smaller one.

    One set where all units are taken, none where there are too few.
    """
    if count > len(units):
        return []
    orders = [torch.randperm(len(units), generator=generator(seed, "cascade", *words, str(draw))) for draw in range(draws)]
    every = [[int(units[k]) for k in order[:count]] for order in orders]
    return every[:1] if count == len(units) else every


def strongest_pairs(matrix: np.ndarray, units: Sequence[int], count: int) -> list[tuple[int, int]]:
    """The pairs of different units with the largest values of a matrix (units, units), NaN left out; ties to the lower units."""
    inside = np.asarray(units)
    a, b = np.triu_indices(len(inside), 1)
    a, b = inside[a], inside[b]
    values = (matrix[a, b] + matrix[b, a]) / 2
    known = np.isfinite(values)
    order = np.argsort(-values[known], kind="stable")[:count]
    return [(int(i), int(j)) for i, j in zip(a[known][order], b[known][order], strict=True)]
