"""The HTML page of a pruning run."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from nodelens.pruning.sweep.ranking import areas, best_cell, curves, measure_of
from nodelens.results.files import read_json, reading
from nodelens.results.result import Result, load, values_of

from .definitions import definitions, definitions_of
from .document import Document, block
from .elements import contents, section, table
from .headline import command_of, head
from .metric_figures import first_of
from .page import drawings_of_result
from .plot import Plot
from .pruning_figures import drawings_of_sweep, kept, latencies, plots_of_sweep
from .unit_data import explorer

_OF_CELL = {"criterion", "allocation", "compensate", "mode", "amounts", "seeds", "save", "hydra.run.dir", "report.plotly"}
_MOST = 4_000_000  # shares of cells and groups that the page offers
_SHOWN = [
    "criterion",
    "allocation",
    "compensate",
    "mode",
    "amount",
    "seed",
    "accuracy",
    "perplexity",
    "loss",
    "macs_share",
    "params_share",
]


def write_pruning_page(folder: str | Path, plotly: str = "shared", figures: Sequence[str] = ()) -> Path:
    """Writes ``report.html`` of a pruning run: curves, Pareto front, ranking, the units that each cell keeps, groups and scores.

    plotly, figures: as for the page of a measurement. Raises FileNotFoundError for a folder without a finished run.
    """
    folder = Path(folder)
    result = load(folder)
    sweep = read_sweep(folder)
    document = Document(folder / "report.html", plotly, figures)
    means = f"<h3>Means over seeds by amount</h3>{document.table(means_by_amount(sweep), 'means')}"
    parts = section("Sweep", [*map(document.plot, plots_of_sweep(sweep)), means])
    parts += section("Cells", [_cells(document, folder, sweep, result)])
    parts += section("Pruning groups", [document.table(result.layers, "groups")])
    frozen = result.metadata.get("frozen") or []
    parts += section("Frozen groups", [table(pd.DataFrame(frozen).set_index("what"), words=True)]) if frozen else []
    if values_of(result.units):
        known, drawings = definitions_of(result), drawings_of_result(result)
        plots = [drawings[name]() for name in ("units", "agreement") if name in drawings]
        parts += section("Scores", [*map(document.plot, plots), explorer(document, result, known)])
        parts += section("Definitions", [definitions(result)])
    return document.write([*head(folder, result, numbers_of(sweep)), contents(parts), *parts], f"nodelens: {folder.name}")


def read_sweep(folder: Path) -> pd.DataFrame:
    """The table of the cells of a pruning run. Raises FileNotFoundError without one, and ValueError for a damaged file."""
    with reading(folder / "sweep.parquet") as path:
        return pd.read_parquet(path)


def drawings_of_pruning(result: Result) -> dict[str, Callable[..., Plot]]:
    """How each plot of a pruning run is drawn, by name. result: as ``nl.load`` returns it; none for other results."""
    folder = result.folder
    if folder is None or not (folder / "sweep.parquet").is_file():
        return {}
    sweep, units = read_sweep(folder), result.layers["units"]
    found, best = drawings_of_sweep(sweep), best_cell(sweep)
    names = [str(row.name) for row in _done(sweep)] if (folder / "cells").is_dir() else []
    order = first_of(names, best["name"]) if names and best is not None else names
    first = next((name for name in order if len(_kept_by(folder, sweep, units, name))), None)
    return found if first is None else found | {"kept": partial(_kept, folder, sweep, units, first_of(order, first))}


def _kept(folder: Path, sweep: pd.DataFrame, units: pd.Series, names: list[str], cell: str | None = None) -> Plot:
    """The units that a cell keeps; of the first of the names without one. Raises ValueError for a cell that cannot be shown."""
    name = first_of(names, cell, "finished cell")[0]
    shares = _kept_by(folder, sweep, units, name)
    if not len(shares):
        raise ValueError(f"what cell {name!r} removed cannot be read in {folder / 'cells'}: choose another cell")
    return kept(shares.iloc[0], name)


def _kept_by(folder: Path, sweep: pd.DataFrame, units: pd.Series, cell: str) -> pd.DataFrame:
    return kept_shares(folder, sweep[sweep["name"] == cell], units)


def numbers_of(sweep: pd.DataFrame) -> dict[str, str]:
    """Headlines of a sweep: cells, and the dense model's accuracy or perplexity."""
    measure, done = measure_of(sweep), int((sweep["status"] == "done").sum())
    dense = float(sweep[f"dense_{measure}"].iloc[0])
    found = {"cells finished": f"{done:,} of {len(sweep):,}", "criteria": f"{sweep['criterion'].nunique():,}"}
    return found | {f"test {measure}, dense": f"{100 * dense:.2f} %" if measure == "accuracy" else f"{dense:.3f}"}


def means_by_amount(sweep: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds by combination (rows) and requested amount, with the area under the curve."""
    area = areas(sweep)
    means = curves(sweep)["mean"].unstack("amount").loc[area.index]
    return area[["area"]].join(means.rename(columns=lambda amount: f"{amount:g}"))


def _cells(document: Document, folder: Path, sweep: pd.DataFrame, result: Result) -> str:
    """The cells as a table, in which one is chosen: its command, and the share of units that it keeps in each group."""
    shown = [c for c in (*_SHOWN, *latencies(sweep), "error") if c in sweep and sweep[c].notna().any()]
    few = len(sweep) * len(result.layers) <= _MOST
    shares = kept_shares(folder, sweep, result.layers["units"]) if few else pd.DataFrame()
    document.embed("cells", {"table": block(sweep.set_index("name")[shown]), "command": command_of(folder, "prune", _OF_CELL)})
    if len(shares.columns):
        document.embed("kept", block(shares.rename_axis("name")))
        document.embed("cell", kept(shares.iloc[0], str(shares.index[0])).figure.to_json())
    having = " data-kept" if len(shares.columns) else ""
    return (
        f"<div data-widget='cells'{having}><p class='soft'>Choose a cell, here "
        "or in the Pareto front, to see its command and the units that it keeps in each group.</p><div class='chosen'></div>"
        "<div class='canvas' role='img' tabindex='0' aria-label='Share of units kept by group'></div><div class='rows'></div></div>"
    )


def kept_shares(folder: Path, sweep: pd.DataFrame, units: pd.Series) -> pd.DataFrame:
    """The share of each group's units that a cell keeps, one row per cell whose file can be read.

    units: the number of units by group
    """
    names = [str(name) for name in units.index]
    removed: dict[str, np.ndarray] = {}
    for name in sweep.loc[sweep["status"] == "done", "carried_out_as"].dropna().unique():
        try:
            found = read_json(folder / "cells" / f"{name}.json").get("removed") or {}
        except (OSError, ValueError, AttributeError):  # a cell that was deleted or is damaged has no picture
            continue
        removed[name] = np.array([len(found.get(group, ())) for group in names])
    rows = {
        row.name: 1 - removed[row.carried_out_as] / units.to_numpy(float) for row in _done(sweep) if row.carried_out_as in removed
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=names) if rows else pd.DataFrame()


def _done(sweep: pd.DataFrame) -> list[pd.Series]:
    """Names of finished cells and of those whose outcome they share."""
    done = sweep.loc[sweep["status"] == "done", ["name", "carried_out_as"]]
    return list(done.itertuples(index=False))
