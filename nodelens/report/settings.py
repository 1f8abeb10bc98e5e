"""Which settings differ between runs, and the usual choice of each."""

from collections.abc import Sequence

import pandas as pd


def settings_of(frame: pd.DataFrame) -> list[str]:
    """The settings that differ between the runs of a frame, without seeds and paths; those with most choices first."""
    found = [c for c in frame.attrs["settings"] if not is_seed(c) and not str(c).endswith(("path", "_dir"))]
    found = [c for c in found if frame[c].map(lambda value: isinstance(value, (str, int, float))).all()]
    return sorted(found, key=lambda c: -frame[c].nunique())


def usual(frame: pd.DataFrame, settings: Sequence[str]) -> pd.DataFrame:
    """Whether each row has the most frequent choice of each setting; of equally frequent ones the smallest counts."""
    modes = {c: frame.drop_duplicates("run")[c].mode() for c in settings}
    return pd.DataFrame({c: frame[c] == (mode.iloc[0] if len(mode) else None) for c, mode in modes.items()}, index=frame.index)


def is_seed(column: str) -> bool:
    """Whether a setting is a seed, whose choices are repetitions."""
    return str(column).rpartition(".")[2] == "seed"
