"""The modules of units as columns of the table of units: one per association, and one for modules of all layers together."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from nodelens.engine.associations import ALL_LAYERS
from nodelens.results.result import Result

from .graph import NONE

OF_A_LAYER = "module_"
OF_ALL_LAYERS = "stacked_module_"


def label_columns(
    index: pd.MultiIndex, labels: Mapping[tuple[str, str], np.ndarray], names: Mapping[str, Any]
) -> pd.DataFrame | None:
    """Columns from {(layer, association): (units,) labels}, -1 for a unit in no module; None without any.

    Those of the layer ``all``, in the order of the table, are columns of their own: a unit has a module in its layer, and another
    one among the units of all layers.
    """
    columns = {}
    for name in names:
        own = {layer: found for (layer, other), found in labels.items() if other == name}
        for layer in [layer for layer in own if is_stack(index, layer)]:
            columns[f"{OF_ALL_LAYERS}{name}"] = pd.Series(own.pop(layer), index=index)
        if own:
            column = pd.Series(NONE, index=index)
            for layer, found in own.items():
                column.loc[[layer]] = found
            columns[f"{OF_A_LAYER}{name}"] = column
    in_order = sorted(columns, key=lambda column: column.startswith(OF_ALL_LAYERS))
    return pd.DataFrame({column: columns[column] for column in in_order}) if columns else None


def is_stack(index: pd.MultiIndex, layer: str) -> bool:
    """Whether a name is that of all layers together, and not that of a layer of the table."""
    return layer == ALL_LAYERS and layer not in index.unique(level="layer")


def labels_of(units: pd.DataFrame, layer: str, association: str) -> pd.Series | None:
    """The labels of the units of a layer, or of all layers together; None where the table has none."""
    stack = is_stack(units.index, layer)
    column = f"{OF_ALL_LAYERS if stack else OF_A_LAYER}{association}"
    if column not in units:
        return None
    found = units[column] if stack else units[column].loc[layer]
    return found.astype(float).fillna(NONE).astype(int)


def every_labels(units: pd.DataFrame) -> dict[tuple[str, str], np.ndarray]:
    """{(layer, association): (units,) labels} of all columns of modules of a table, where any unit is in a module."""
    found = {}
    for column in map(str, units):
        prefix = next((each for each in (OF_A_LAYER, OF_ALL_LAYERS) if column.startswith(each)), None)
        if prefix is None:
            continue
        layers = [ALL_LAYERS] if prefix == OF_ALL_LAYERS else map(str, units.index.unique(level="layer"))
        for layer in layers:
            name = column.removeprefix(prefix)
            labels = labels_of(units, layer, name)
            if labels is not None and (labels >= 0).any():
                found[layer, name] = labels.to_numpy()
    return found


def drawn_units(result: Result, layer: str, count: int) -> np.ndarray | None:
    """Which units of a layer the ``count`` rows of its matrix are: some, if the layer is wide; None for all of them."""
    width = units_of(result, layer)
    if count == width:
        return None
    sites = result.metadata.get("covariance") or []
    return next((np.array(site["channels"]) for site in sites if site["channels"] and site["width"] == width), None)


def units_of(result: Result, layer: str) -> int:
    """The number of units of a layer, or of all layers together."""
    return len(result.units if is_stack(result.units.index, layer) else result.units.loc[layer])
