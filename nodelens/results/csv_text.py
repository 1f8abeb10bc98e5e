"""Tables as CSV text in which no cell is a formula of a spreadsheet."""

import pandas as pd

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a formula begins


def csv_text(table: pd.DataFrame, index: bool = True) -> str:
    """The text of a CSV file. Words that a spreadsheet would run as a formula, such as ``=cmd()``, begin with an apostrophe.

    index: whether named index levels are columns of the file
    """
    named = index and any(name is not None for name in table.index.names)
    flat = table.reset_index() if named else table
    columns = [column if pd.api.types.is_numeric_dtype(column) else column.map(_safe) for _, column in flat.items()]
    safe = pd.concat(columns, axis=1) if columns else flat
    return safe.set_axis([_safe(name) for name in flat.columns], axis=1).to_csv(index=False)


def _safe(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
