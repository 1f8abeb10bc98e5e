"""How the scores of units change over the epochs of a training: trends, and how stable their ranks are."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from nodelens.messages import check_folder

from .files import reading
from .findings import Findings
from .result import values_of

_FILE = re.compile(r"units_(\d+)\.parquet")


def score_trends(folder: str | Path, columns: str | Sequence[str] | None = None, top: float = 0.1) -> Findings:
    """Trends and stability of the scores of units over the epochs that ``callbacks=measure`` wrote.

    folder: a run of training, or its folder ``epochs``. columns: metrics; None: all. top: share of a layer's units whose overlap
    between epochs is compared.

    Tables: ``units``, one row per layer, unit and metric: ``first`` and ``last`` value, ``mean``, ``slope`` per epoch (least
    squares), ``scatter`` (standard deviation of the residuals of that line, ddof 2) and ``monotone``, the Spearman correlation with
    the epoch; NaN where a value is missing, or from fewer than three epochs. ``ranks``, one row per layer, metric and epoch:
    Spearman correlation of the units' scores with those of the epoch ``before`` and of the last one (``with_last``), and the share
    of the ``top`` units of the last epoch that are among the top already (``top_overlap``).

    Raises FileNotFoundError without tables of epochs, and ValueError for fewer than two epochs, tables of different units, and an
    unknown column.
    """
    check_folder("nl.score_trends", folder)
    if not 0 < top <= 1:
        raise ValueError(f"top is {top}; it is a share of the units of a layer, above 0 and at most 1")
    return trends_of(_several(Path(folder)), columns, top)


def trends_of(tables: Mapping[int, pd.DataFrame], columns: str | Sequence[str] | None = None, top: float = 0.1) -> Findings:
    """``score_trends`` of two or more tables that were read already. tables: {epoch: table}, as ``epoch_tables`` returns them."""
    chosen = _columns(tables, columns)
    epochs = np.array(list(tables), dtype=float)
    index = next(iter(tables.values())).index
    units, ranks = [], []
    for name in chosen:
        values = np.stack([table[name].to_numpy(float) for table in tables.values()])  # (epochs, units)
        units.append(_of_units(values, epochs, index).assign(metric=name))
        for layer, rows in pd.Series(np.arange(len(index)), index=index).groupby(level="layer", sort=False):
            ranks.append(_of_ranks(values[:, rows.to_numpy()], list(tables), top).assign(layer=layer, metric=name))
    of_units = pd.concat(units).set_index("metric", append=True)
    of_ranks = pd.concat(ranks, ignore_index=True)[["layer", "metric", "epoch", "before", "with_last", "top_overlap"]]
    return Findings("trends", {"units": of_units, "ranks": of_ranks}, _lines(of_ranks, len(tables)), metadata={"top": top})


def epoch_tables(folder: str | Path) -> dict[int, pd.DataFrame]:
    """{epoch: table of units} that ``callbacks=measure`` wrote for a training, or to its folder ``epochs``.

    Raises FileNotFoundError without tables of epochs, and ValueError for tables of different units.
    """
    files = epoch_files(folder)
    if not files:
        raise FileNotFoundError(
            f"{_place(Path(folder))} has no tables of epochs (units_000.parquet and so on): train with callbacks=measure"
        )
    tables = {}
    for epoch, path in files.items():
        with reading(path) as file:
            tables[epoch] = pd.read_parquet(file)
    first = next(iter(tables.values())).index
    other = next((epoch for epoch, table in tables.items() if not table.index.equals(first)), None)
    if other is not None:
        raise ValueError(f"{files[other]} has other units than {files[next(iter(files))]}: give the epochs of one training")
    return tables


def epoch_files(folder: str | Path) -> dict[int, Path]:
    """{epoch: the file of its table of units} of a training or its folder ``epochs``, in order; none without callbacks=measure."""
    found = {int(match[1]): path for path in _place(Path(folder)).glob("units_*.parquet") if (match := _FILE.fullmatch(path.name))}
    return dict(sorted(found.items()))


def _place(folder: Path) -> Path:
    return folder / "epochs" if (folder / "epochs").is_dir() else folder


def _several(folder: Path) -> dict[int, pd.DataFrame]:
    tables = epoch_tables(folder)
    if len(tables) < 2:
        raise ValueError(f"{_place(folder)} has one epoch: a trend needs two or more")
    return tables


def common_metrics(tables: Mapping[int, pd.DataFrame]) -> list[str]:
    """The metrics that every epoch has."""
    return [name for name in values_of(next(iter(tables.values()))) if all(name in table for table in tables.values())]


def _columns(tables: Mapping[int, pd.DataFrame], columns: str | Sequence[str] | None) -> list[str]:
    """The metrics that are asked for."""
    there = common_metrics(tables)
    asked = there if columns is None else [columns] if isinstance(columns, str) else list(columns)
    unknown = next((name for name in asked if name not in there), None)
    if unknown is not None or not asked:
        raise ValueError(f"the epochs have no metric {unknown!r}; they have {', '.join(there) or 'none'}")
    return asked


def _of_units(values: np.ndarray, epochs: np.ndarray, index: pd.Index) -> pd.DataFrame:
    """Trends of one metric, one row per unit."""
    n, away = len(epochs), epochs - epochs.mean()
    slope = away @ values / (away @ away)
    residuals = values - values.mean(0) - np.outer(away, slope)
    scatter = np.sqrt((residuals**2).sum(0) / (n - 2)) if n > 2 else np.full(values.shape[1], np.nan)
    monotone = np.array([_spearman(v, epochs) if n > 2 and not np.isnan(v).any() else np.nan for v in values.T])
    found = {"first": values[0], "last": values[-1], "mean": values.mean(0), "slope": slope, "scatter": scatter}
    return pd.DataFrame(found | {"monotone": monotone}, index=index)


def _of_ranks(values: np.ndarray, epochs: list[int], top: float) -> pd.DataFrame:
    """Agreement of the ranks of a layer's units between epochs, one row per epoch."""
    count = max(1, int(top * values.shape[1] + 0.5))
    last = _top(values[-1], count)
    rows = []
    for k, epoch in enumerate(epochs):
        before = _spearman(values[k], values[k - 1]) if k else np.nan
        overlap = len(last & _top(values[k], count)) / len(last) if last else np.nan
        rows.append({"epoch": epoch, "before": before, "with_last": _spearman(values[k], values[-1]), "top_overlap": overlap})
    return pd.DataFrame(rows)


def _top(values: np.ndarray, count: int) -> set[int]:
    known = np.flatnonzero(~np.isnan(values))
    return set(known[np.argsort(-values[known], kind="stable")[:count]].tolist())


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman correlation of the pairs without NaN; NaN for fewer than two, and where either does not vary."""
    known = ~(np.isnan(a) | np.isnan(b))
    if known.sum() < 2 or np.ptp(a[known]) == 0 or np.ptp(b[known]) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(a[known]), rankdata(b[known]))[0, 1])


def _lines(ranks: pd.DataFrame, epochs: int) -> list[str]:
    mean = ranks.groupby(["metric", "epoch"], sort=False)[["before", "with_last"]].mean()
    lines = [f"{epochs} epochs; Spearman correlation of the units' scores, mean over layers"]
    for metric, rows in mean.groupby(level="metric", sort=False):
        last = rows["before"].iloc[-1]
        lines.append(f"{metric}: first with last epoch {rows['with_last'].iloc[0]:.2f}, last two epochs {last:.2f}")
    return lines
