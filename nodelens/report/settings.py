"""Which settings differ between runs, and the usual choice of each."""

from collections.abc import Sequence
from typing import Any

import pandas as pd


def settings_of(frame: pd.DataFrame) -> list[str]:
    """The settings that differ between the runs of a frame, without seeds and paths; those with most choices first.

    A setting that some runs do not have, such as an option of a metric that they do not measure, counts if the others differ in it.
    """
    found = [c for c in frame.attrs["settings"] if not is_seed(c) and not str(c).endswith(("path", "_dir"))]
    found = [c for c in found if frame[c].dropna().map(lambda value: isinstance(value, (str, int, float))).all()]
    found = [c for c in found if frame[c].nunique() > 1]
    return sorted(found, key=lambda c: -frame[c].nunique())


def choices_of(values: pd.Series) -> list[Any]:
    """The choices of a setting: numbers in their order, then words."""
    return sorted(values.dropna().unique(), key=lambda choice: (isinstance(choice, str), choice))


def usual(frame: pd.DataFrame, settings: Sequence[str]) -> pd.DataFrame:
    """Whether each row has the most frequent choice of each setting; of equally frequent ones the smallest counts.

    Not to have a setting is a choice, too.
    """
    modes = {c: frame.drop_duplicates("run")[c].mode(dropna=False).iloc[0] for c in settings}
    chosen = {c: frame[c].isna() if pd.isna(mode) else frame[c] == mode for c, mode in modes.items()}
    return pd.DataFrame(chosen, index=frame.index)


def linked(frame: pd.DataFrame, setting: str, others: Sequence[str]) -> list[str]:
    """The settings that have one choice for each choice of ``setting``, so that they change with it or not at all."""
    counts = frame.groupby(setting, dropna=False)[list(others)].nunique(dropna=False)
    return [c for c in others if (counts[c] <= 1).all()]


def is_seed(column: str) -> bool:
    """Whether a setting is a seed, whose choices are repetitions."""
    return str(column).rpartition(".")[2] == "seed"
