"""CSV that spreadsheets open as text: no cell is taken for a formula."""

from typing import Any

import pandas as pd

_FIRST = ("=", "+", "-", "@", "\t", "\r")  # characters that begin a formula


def without_formulas(table: pd.DataFrame) -> pd.DataFrame:
    """A table in which an apostrophe precedes each text that a spreadsheet would run, such as ``=cmd()``. Numbers stay.

    >>> without_formulas(pd.DataFrame({"layer": ["fc1", "=1+1"], "rq": [-0.5, 0.5]}))["layer"].tolist()
    ['fc1', "'=1+1"]
    """
    return _changed(table, lambda text: f"'{text}" if text.startswith(_FIRST) else text)


def with_formulas(table: pd.DataFrame) -> pd.DataFrame:
    """The table that ``without_formulas`` was given."""
    return _changed(table, lambda text: text[1:] if text[:1] == "'" and text[1:].startswith(_FIRST) else text)


def _changed(table: pd.DataFrame, change: Any) -> pd.DataFrame:
    """A table with other texts."""
    texts = [name for name in table if pd.api.types.is_object_dtype(table[name]) or pd.api.types.is_string_dtype(table[name])]
    return table.assign(**{name: table[name].map(lambda v: change(v) if isinstance(v, str) else v) for name in texts})


def csv_text(table: pd.DataFrame) -> str:
    """The text of a CSV file in which no cell and no heading is a formula; named index levels are columns."""
    named = any(name is not None for name in table.index.names)
    flat = table.reset_index() if named else table
    labels = {name: flat[name].astype(object) for name in flat.select_dtypes("category")}
    safe = without_formulas(flat.assign(**labels))
    return safe.rename(columns=lambda name: f"'{name}" if str(name).startswith(_FIRST) else name).to_csv(index=False)
