"""Connectivity of units within their layer: how strongly each is linked, inside its module and to other modules."""

import numpy as np
import pandas as pd

from .graph import one_hot
from .layer_modules import LayerModules


def connectivity_table(found: LayerModules, units: np.ndarray) -> pd.DataFrame:
    """One row per live unit: unit, module, strength, within_z and participation. units: numbers of the rows of the association.

    strength:      k_i, the sum of its absolute associations with the other units
    within_z:      (k_i inside its module - mean of the module) / standard deviation of the module, ddof 0; 0 where all are equal
    participation: 1 - sum over modules m of (k_im / k_i)^2, k_im its links to m: 0 if all are in one module, at most 1 - 1/modules

    Source: Guimera & Amaral 2005, Nature 433:895, with weights.
    """
    weights, labels = np.abs(found.graph.weights), found.modules.labels[found.graph.live]
    to_modules = weights @ one_hot(labels)
    strength, inside = to_modules.sum(1), to_modules[np.arange(len(labels)), labels]
    by_module = pd.Series(inside).groupby(labels)
    spread = by_module.transform(lambda each: each.std(ddof=0)).to_numpy()
    apart = inside - by_module.transform("mean").to_numpy()
    z = np.divide(apart, spread, out=np.zeros_like(apart), where=spread > 1e-12 * np.abs(inside).max(initial=0))
    return pd.DataFrame(
        {
            "unit": units[found.graph.live],
            "module": labels,
            "strength": strength,
            "within_z": z,
            "participation": 1 - ((to_modules / strength[:, None]) ** 2).sum(1),
        }
    )
