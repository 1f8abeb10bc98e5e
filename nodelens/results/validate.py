"""Whether what a result's files hold is a result: checksums tell accidents, and this tells edits that mend the checksums."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.api import types

from nodelens.messages import shown

from .files import is_name

_RESTORE = "restore it from a copy, or run the analysis again"
_DICTS = ("config", "data", "evaluation", "metrics", "model", "objective", "versions", "weights")
_LISTS: Mapping[str, Mapping[str, type | tuple[type, ...]]] = {  # lists of dictionaries, and what each of these has
    "missing": {"layer": str, "column": str, "reason": str},
    "counts": {"rule": str, "metric": str},
    "left_out": {"rows": int, "site": str},
}


def check_metadata(file: Path, metadata: Mapping[str, Any]) -> None:
    """Raises ValueError, with the file and the key, for metadata of another form than ``analyze`` and ``prune`` write."""

    def refuse(where: str, value: Any, takes: str) -> None:
        raise ValueError(f"{file}: {where} is {shown(value)}; it is {takes}: {_RESTORE}")

    for key in _DICTS:
        if not isinstance(metadata.get(key), (dict, type(None))):
            refuse(key, metadata[key], "a dictionary")
    for name, about in (metadata.get("metrics") or {}).items():
        if not isinstance(about, dict) or not isinstance(about.get("metric", ""), str):
            refuse(f"metrics.{name}", about, "a dictionary with the metric's name")
    for key in ("filled_groups", "samples"):
        value = metadata.get(key)
        if value is not None and (type(value) is not int or value < 0):
            refuse(key, value, "a count")
    warnings = metadata.get("warnings") or []
    if not isinstance(warnings, list) or not all(isinstance(line, str) for line in warnings):
        refuse("warnings", warnings, "a list of texts")
    names = metadata.get("analyses") or []
    if not isinstance(names, list) or not all(map(is_name, names)):
        refuse("analyses", names, "a list of names of subfolders")
    for key, needed in _LISTS.items():
        entries = metadata.get(key) or []
        if not isinstance(entries, list):
            refuse(key, entries, "a list")
        for k, entry in enumerate(entries):
            if not isinstance(entry, dict) or not all(isinstance(entry.get(name), kind) for name, kind in needed.items()):
                refuse(f"{key}.{k}", entry, f"a dictionary with {', '.join(needed)}")


def check_table(file: Path, table: pd.DataFrame, index: Sequence[str], metrics: Mapping[str, Any]) -> None:
    """Raises ValueError, with the file and the column, for another index than that of the table, and cells that are no values.

    Values are numbers, truth values and texts; a metric and its standard error are numbers.
    """
    if list(table.index.names) != list(index) or not table.index.is_unique:
        found = ", ".join(map(str, table.index.names))
        twice = "" if table.index.is_unique else ", with rows that occur twice"
        raise ValueError(f"{file} has the index ({found}){twice}; it is ({', '.join(index)}), one row each: {_RESTORE}")
    lost = next((c for c in table if str(c).endswith("_se") and (m := str(c)[:-3]) in metrics and m not in table), None)
    if lost is not None:
        raise ValueError(f"{file} has the column {lost!r} without {str(lost)[:-3]!r}: {_RESTORE}")
    for level in range(len(index)):
        values = table.index.get_level_values(level)
        whole = index[level] == "unit" and len(values) > 0  # an empty level has no integers
        fits = types.is_integer_dtype(values.dtype) and (values >= 0).all() if whole else all(isinstance(v, str) for v in values)
        if not fits:
            kind = "counts from 0" if whole else "texts"
            raise ValueError(f"{file}: {index[level]} has {shown(_first(values))}; it has {kind}: {_RESTORE}")
    for name in table.columns if len(table) else ():
        number = types.is_numeric_dtype(table[name].dtype) and not types.is_complex_dtype(table[name].dtype)
        measured = str(name).removesuffix("_se") in metrics
        if not number and (measured or not _texts(table[name])):
            takes = "numbers" if measured else "numbers or texts"
            raise ValueError(f"{file}: column {name!r} has {shown(_first(table[name]))}; it has {takes}: {_RESTORE}")


def check_sizes(folder: Path, units: pd.DataFrame, layers: pd.DataFrame) -> None:
    """Raises ValueError, with the file and the layer, where a layer has another number of units in the two tables.

    The columns ``units`` and ``type`` of the layers are counts and texts.
    """
    for name, fits, kind in (("units", _counts, "counts from 0"), ("type", _texts, "texts")):
        if name in layers and len(layers) and not fits(layers[name]):
            raise ValueError(f"{folder / 'layers.parquet'}: {name} has {shown(_first(layers[name]))}; it has {kind}: {_RESTORE}")
    if "units" not in layers:
        return
    rows, said = units.groupby(level="layer").size().to_dict(), layers["units"].to_dict()
    for layer in {**said, **rows}:
        if rows.get(layer, 0) != said.get(layer):
            raise ValueError(
                f"{folder / 'units.parquet'} has {rows.get(layer, 0)} units of {layer!r}, and layers.parquet "
                f"{said.get(layer, 'none')}: {_RESTORE}"
            )


def _counts(column: pd.Series) -> bool:
    return types.is_integer_dtype(column.dtype) and bool(column.notna().all() and (column >= 0).all())


def check_matrices(file: Path, matrices: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError, with the file and the key, for a name without layer and metric, and for anything but a matrix."""
    for key, array in matrices.items():
        if "::" not in key or array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.number):
            found = f"{array.dtype} {tuple(array.shape)}"
            raise ValueError(f"{file}: {shown(key)} is {found}; an entry is a matrix or vector named layer::metric: {_RESTORE}")


def _texts(column: pd.Series) -> bool:
    kind = types.is_bool_dtype(column.dtype) or types.is_string_dtype(column.dtype) or types.is_object_dtype(column.dtype)
    return kind and all(isinstance(v, (str, bool, np.bool_)) or v is None or v is pd.NA or v != v for v in column)


def _first(values: Any) -> Any:
    return next(iter(values), None)
