"""Logging of results to experiment loggers: scalars and tables."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from .result import Result, values_of


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


def log_result(loggers: Iterable[Any], result: Result, summary: dict[str, float] | None = None) -> None:
    """Logs final scalars to every logger, and tables to loggers that accept them (W&B)."""
    for logger in loggers:
        logger.log_metrics(scalars(result) | (summary or {}))
        if hasattr(logger, "log_table"):
            logger.log_table("units", dataframe=result.units.reset_index())
            logger.log_table("layers", dataframe=result.layers.reset_index())
            if len(result.edges):
                logger.log_table("edges", dataframe=result.edges.reset_index())


def log_tables(loggers: Iterable[Any], prefix: str, tables: Mapping[str, pd.DataFrame]) -> None:
    """Logs tables as ``<prefix>/<name>`` to the loggers that accept them."""
    for logger in loggers:
        for name, table in tables.items():
            if hasattr(logger, "log_table") and len(table):
                plain = table.astype(object).where(table.notna(), None)  # None for missing values
                logger.log_table(f"{prefix}/{name}", dataframe=plain)


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
        if hasattr(logger, "log_table"):
            logger.log_table("sweep", dataframe=table.astype(object).where(table.notna(), None))  # None for missing values


def _varied(table: pd.DataFrame) -> list[str]:
    """The columns that distinguish curves: the criterion, and others that vary."""
    return [k for k in ("criterion", "allocation", "compensate", "mode") if k == "criterion" or table[k].nunique() > 1]


def close(loggers: Iterable[Any]) -> None:
    """Ends the run of each logger, so that the next job of a sweep starts its own."""
    for logger in loggers:
        logger.finalize("success")
        if hasattr(logger, "log_table") and logger._experiment is not None:  # experiment would open one
            logger.experiment.finish()
