"""The loss and accuracy of each epoch of a training, as its folder keeps them."""

import re
from pathlib import Path

import pandas as pd

from .files import checked

HISTORY = "history.csv"  # in the folder of a training


def read_history(path: Path) -> pd.DataFrame:
    """The rows of ``history.csv``, by epoch; none where there is no such file. Raises ValueError for a damaged file."""
    if not path.is_file():
        return pd.DataFrame(index=pd.Index([], dtype=int, name="epoch"))
    return pd.read_csv(checked(path), index_col="epoch")


def history_of(folder: Path) -> pd.DataFrame:
    """One row per epoch of a training: the means of what was logged under train/ and val/.

    Earlier versions wrote a CSV file per start of a training: of a value that several logged, the last counts.
    """
    if len(kept := read_history(folder / HISTORY)):
        return kept
    found = []
    starts = {int(m[1]): place for place in folder.glob("csv/version_*") if (m := re.fullmatch(r"version_(\d+)", place.name))}
    for file in (starts[k] / "metrics.csv" for k in sorted(starts)):
        if not file.is_file():
            continue
        logged = pd.read_csv(file)
        chosen = [c for c in logged if str(c).startswith(("train/", "val/"))]
        if "epoch" in logged and chosen:
            found.append(logged.groupby("epoch")[chosen].mean())
    if not found:
        return pd.DataFrame()
    return pd.concat(found).groupby(level="epoch").last().dropna(how="all")  # of each column the last value that there is
