"""The figures of a run's page, for loggers that show them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from nodelens.results.result import Result


def result_figures(result: Result) -> dict[str, Any]:
    """{name: plotly figure} of a pass and its analyses."""
    from nodelens.report.analysis_plots import plots_of
    from nodelens.report.page import plots_of_result

    found = _by_name(plots_of_result(result))
    for name, analysis in result.analyses.items():
        found |= {f"{name}/{which}": figure for which, figure in _by_name(plots_of(analysis)).items()}
    return found


def sweep_figures(table: pd.DataFrame, scores: Result) -> dict[str, Any]:
    """{name: plotly figure} of a sweep and of the scores behind it."""
    from nodelens.report.page import plots_of_result
    from nodelens.report.pruning_figures import plots_of_sweep

    return _by_name(plots_of_sweep(table)) | {f"scores/{k}": figure for k, figure in _by_name(plots_of_result(scores)).items()}


def training_figures(folder: Path) -> dict[str, Any]:
    """{name: plotly figure} of the analyses that followed each epoch of a training; its curves are logged as numbers."""
    from nodelens.analysis.registry import load_analysis
    from nodelens.report.analysis_plots import plots_of

    found: dict[str, Any] = {}
    for file in sorted((folder / "epochs").glob("*/metadata.json")):
        plots = _by_name(plots_of(load_analysis(file.parent)))
        found |= {f"{file.parent.name}/{name}": figure for name, figure in plots.items()}
    return found


def _by_name(plots: Iterable[Any]) -> dict[str, Any]:
    return {plot.name: plot.figure for plot in plots}
