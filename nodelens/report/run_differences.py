"""Two of many runs, unit by unit: their units as data of a page, in pieces that are loaded when a run is chosen."""

from collections.abc import Sequence

import pandas as pd

from .document import Document, block
from .unit_data import VALUES

_MOST = 8_000_000  # values of all runs that a page offers


def differences(document: Document, units: pd.DataFrame, metrics: Sequence[str]) -> str:
    """The part of a page in which two runs and a metric are chosen; empty for one run, and without metrics."""
    runs = list(dict.fromkeys(units["run"]))
    if len(runs) < 2 or not metrics:
        return ""
    kept = _columns(units, metrics)
    if len(units) * len(kept) > _MOST:
        return f"<p>{len(units):,} units of {len(runs)} runs are too many for a page: load two of the runs with nl.load.</p>"
    pieces = _pieces(units, runs, len(kept))
    for k, piece in enumerate(pieces):
        document.embed(
            f"runs-{k}", block(units.loc[units["run"].isin(piece), ["run", "layer", "unit", *kept]].reset_index(drop=True))
        )
    errors = [name for name in metrics if f"{name}_se" in kept]
    document.embed("runs", {"runs": runs, "pieces": pieces, "metrics": list(metrics), "errors": errors})
    return (
        "<div data-widget='differences'><div class='menus'></div><p class='soft'>Each dot is a unit, dark in early layers. On the "
        "dotted line both runs have the same value. The table lists the largest differences first, in standard errors of the "
        "difference where they are known, as if both runs had been measured on different samples. Units correspond if both runs "
        "are of the same weights.</p>"
        "<div class='canvas' style='min-height:460px' role='img' tabindex='0' aria-label='Two runs, unit by unit'></div>"
        "<div class='rows'></div></div>"
    )


def _columns(units: pd.DataFrame, metrics: Sequence[str]) -> list[str]:
    return [*metrics, *(f"{name}_se" for name in metrics if f"{name}_se" in units)]


def _pieces(units: pd.DataFrame, runs: Sequence[str], columns: int) -> list[list[str]]:
    """Runs that share a file, of at most so many values."""
    sizes = units.groupby("run", sort=False).size() * columns
    pieces: list[list[str]] = [[]]
    filled = 0
    for run in runs:
        if pieces[-1] and filled + sizes[run] > VALUES:
            pieces.append([])
            filled = 0
        pieces[-1].append(run)
        filled += int(sizes[run])
    return pieces
