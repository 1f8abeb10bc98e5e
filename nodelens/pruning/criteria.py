"""Criteria: a signed sum of metrics, or chance; high means keep."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch

from ..keys import mix
from ..results import values_of

RANDOM = "random"


def scores(units: pd.DataFrame, terms: Mapping[str, float]) -> pd.Series:
    """A score a unit from columns of a unit table, index (layer, unit); high means keep.

    One term is its column times its weight. Several are first turned into ranks within the layer, from 0 (smallest) to 1,
    ties averaged: sums of quantities in different units would follow the widest. NaN where a term is.
    Raises ValueError for a column that is not there, or an empty criterion.
    """
    if not terms:
        raise ValueError("a criterion needs a term at least, such as {taylor: 1.0}")
    missing = [name for name in terms if name not in units]
    if missing:
        there = ", ".join(values_of(units))
        raise ValueError(f"the criterion reads {', '.join(missing)}; the table has {there}")
    if len(terms) == 1:
        ((name, weight),) = terms.items()
        return units[name] * weight
    parts = [_ranks(units[name]) * weight for name, weight in terms.items()]
    return sum(parts[1:], parts[0])


def random_scores(units: pd.DataFrame, seed: int) -> pd.Series:
    """Uniform scores in [0, 1), drawn anew for each seed and layer, by a generator of their own."""
    drawn = []
    for layer, rows in units.groupby(level="layer", sort=False):
        drawn.append(torch.rand(len(rows), generator=generator(seed, str(layer)), dtype=torch.float64).numpy())
    return pd.Series(np.concatenate(drawn), index=units.index)


def generator(seed: int, layer: str) -> torch.Generator:
    """A generator that belongs to a seed and a layer's name, in any process or order."""
    return torch.Generator().manual_seed(int(mix(seed, *layer.encode())))


def _ranks(column: pd.Series) -> pd.Series:
    by_layer = column.groupby(level="layer", sort=False)
    return ((by_layer.rank() - 1) / (by_layer.transform("size") - 1).clip(lower=1)).where(column.notna())
