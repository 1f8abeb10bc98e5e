"""Logging of results to experiment loggers: scalars and tables."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .histograms import histogram
from .result import Result, values_of

_ROWS = 200_000  # of a table


def scalars(result: Result) -> dict[str, float]:
    """``units/<layer>/<metric>``: means over units; ``layers/<layer>/<metric>``; ``edges/<a>-<b>/<metric>``: layer pairs."""
    means = result.units[values_of(result.units)].groupby(level="layer", sort=False).mean()
    edges = result.edges[values_of(result.edges)] if len(result.edges) else pd.DataFrame()
    edges.index = [f"{a}-{b}" for a, b in edges.index]
    found = {
        f"{kind}/{layer}/{metric}": float(value)
        for kind, table in (("units", means), ("layers", result.layers[values_of(result.layers)]), ("edges", edges))
        for layer, row in table.iterrows()
        for metric, value in row.items()
    }
    return {name: value for name, value in found.items() if value == value}


def histograms(result: Result, most: int = 1000) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """``histograms/<layer>/<metric>``: counts (32,) and edges (33,) of a metric's finite values over the units of a layer.

    Of the first metrics only, if there were more than ``most`` histograms.
    """
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    layers = list(result.units.groupby(level="layer", sort=False))
    for metric in values_of(result.units)[: most // max(1, len(layers))]:
        for layer, rows in layers:
            values = rows[metric].to_numpy(dtype=float)
            if np.isfinite(values).any():
                found[f"histograms/{layer}/{metric}"] = histogram(values, 32)
    return found


def log_result(loggers: Iterable[Any], result: Result, summary: Mapping[str, float] | None = None) -> None:
    """Logs final scalars to every logger, and tables and histograms to loggers that accept them (W&B)."""
    for logger in loggers:
        logger.log_metrics(scalars(result) | dict(summary or {}))
        tables = {"units": result.units, "layers": result.layers, "edges": result.edges}
        log_tables([logger], "", {name: table.reset_index() for name, table in tables.items() if len(table)})
        if hasattr(logger, "log_histograms"):
            logger.log_histograms(histograms(result), {})


def log_run(
    loggers: Iterable[Any],
    folder: Path,
    checkpoint: str | None,
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    figures: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """Logs the rest of a finished run: its config, and to W&B where its weights are from, its figures, files and summary.

    figures: gives {name: plotly figure}; called only if a logger shows them.
    """
    for logger in loggers:
        logger.log_hyperparams(dict(config))
        if hasattr(logger, "log_files"):
            logger.use_checkpoint(checkpoint)
            if not logger.is_off:
                logger.log_figures(figures())
            results = [*sorted(folder.glob("*.parquet")), folder / "metadata.json", folder / "epochs"]
            logger.log_files("results", results, ["latest"])
            logger.log_files("pruned", [folder / "pruned"], ["pruned", "latest"])
            logger.log_summary(summary)


def log_tables(loggers: Iterable[Any], prefix: str, tables: Mapping[str, pd.DataFrame]) -> None:
    """Logs tables as ``<prefix>/<name>`` to the loggers that accept them, at most 200,000 rows, which is what W&B shows."""
    for logger in loggers:
        for name, table in tables.items():
            if hasattr(logger, "log_table") and len(table):
                first = table.head(_ROWS)
                plain = first.astype(object).where(first.notna(), None)  # None for missing values
                logger.log_table(f"{prefix}/{name}" if prefix else name, dataframe=plain)


def log_sweep(loggers: Iterable[Any], table: pd.DataFrame, dense: dict[str, float]) -> None:
    """Logs the curves of a sweep, with the amount in per cent as the step, and its table."""
    measure = "perplexity" if "perplexity" in table else "accuracy"
    for logger in loggers:
        logger.log_metrics({f"final/{k}": v for k, v in dense.items()})
        for amount, rows in table.groupby("amount"):
            means = rows.groupby(_varied(table))[measure].mean().dropna()
            names = ["/".join(key) if isinstance(key, tuple) else str(key) for key in means.index]
            curve = {f"prune/{name}/{measure}": float(value) for name, value in zip(names, means, strict=True)}
            logger.log_metrics(curve | {"prune/amount": float(amount)}, step=round(100 * float(amount)))
        log_tables([logger], "", {"sweep": table})


def _varied(table: pd.DataFrame) -> list[str]:
    """The columns that distinguish curves: the criterion, and others that vary."""
    return [k for k in ("criterion", "allocation", "compensate", "mode") if k == "criterion" or table[k].nunique() > 1]


def close(loggers: Iterable[Any]) -> None:
    """Ends the run of each logger, so that the next job of a sweep starts its own."""
    for logger in loggers:
        logger.finalize("success")
        if hasattr(logger, "log_table") and logger._experiment is not None:  # experiment would open one
            logger.experiment.finish()
