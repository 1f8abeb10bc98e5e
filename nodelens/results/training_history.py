"""The loss and accuracy of each epoch of a training, as its folder keeps them."""

from pathlib import Path

import pandas as pd

from .files import checked

HISTORY = "history.csv"  # in the folder of a training


def read_history(path: Path) -> pd.DataFrame:
    """The rows of ``history.csv``, by epoch; none where there is no such file. Raises ValueError for a damaged file."""
    if not path.is_file():
        return pd.DataFrame(index=pd.Index([], dtype=int, name="epoch"))
    return pd.read_csv(checked(path), index_col="epoch")
