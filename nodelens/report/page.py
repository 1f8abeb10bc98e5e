"""The HTML report page of a finished run."""

import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from nodelens.results.findings import Findings
from nodelens.results.result import Result, load, values_of

from . import metric_figures as drawn
from .analysis_plots import plots_of, title_of
from .definitions import definitions, definitions_of, missing
from .document import Document
from .elements import ROWS, contents, section, table
from .graph_figures import network
from .headline import head
from .plot import Plot
from .unit_data import explorer


def write_page(folder: str | Path, plotly: str = "shared", figures: Sequence[str] = ()) -> Path:
    """Writes ``report.html``, an interactive page, from the files of a run; returns its path.

    plotly: where the script that draws is: ``shared``, the file ``plotly.min.js`` beside the page; ``inline``, in the page,
    which is then 5 MB larger; ``cdn``, on the network. Units of large runs and
    large figures are in ``report_files/``, which the page reads when they are shown. figures: formats, such as ``pdf``, in which
    all figures are written to ``figures/``, with their data as CSV.

    Raises FileNotFoundError for a folder without a finished run, and ValueError for another value of plotly.
    """
    folder = Path(folder)
    result = load(folder)
    document = Document(folder / "report.html", plotly, figures)
    parts = _measured(document, result)
    parts += analyses(document, folder, result.metadata.get("analyses") or [])
    if result.metadata.get("metrics"):
        parts += section("Definitions", [definitions(result)])
        parts += section("Missing values and their reasons", [missing(result)])
    return document.write([*head(folder, result), contents(parts), *parts], f"nodelens: {folder.name}")


def plots_of_result(result: Result) -> list[Plot]:
    """The plots of what a pass measured, in the order of the page."""
    return [draw() for draw in drawings_of_result(result).values()]


def drawings_of_result(result: Result) -> dict[str, Callable[..., Plot]]:
    """How each plot of what a pass measured is drawn, by name. Its keywords are options of ``result.plot``."""
    of_units, found = values_of(result.units), dict[str, Callable[..., Plot]]()
    if (of_units or drawn.layer_metrics(result)) and len(drawn.comparable(result).columns):
        found["overview"] = partial(drawn.overview, result)
    if of_units:
        found["units"] = partial(drawn.distributions, result)
    if len(of_units) > 1:
        found["agreement"] = partial(drawn.agreement, result)
    if drawn.layer_metrics(result):
        found["layers"] = partial(drawn.layers, result)
    if len(result.edges) and result.edges[values_of(result.edges)].notna().any(axis=None):
        found |= {"network": partial(network, result), "pairs": partial(drawn.edges, result)}
    return found | {f"spectrum-{name}": partial(drawn.spectrum, result, name) for name in drawn.spectra(result)}


_SECTIONS = {
    "overview": "Overview",
    "units": "Units",
    "agreement": "Units",
    "layers": "Layers",
    "network": "Layer pairs",
    "pairs": "Layer pairs",
}


def _measured(document: Document, result: Result) -> list[str]:
    """The sections of what a pass measured."""
    by: dict[str, list[str]] = {"Overview": [], "Units": [], "Layers": [], "Layer pairs": [], "Input features": []}
    for plot in plots_of_result(result):
        by[_SECTIONS.get(plot.name, "Input features")].append(document.plot(plot))
    known = definitions_of(result)
    if len(result.layers):
        kept = result.layers.columns.intersection(["type", "units"])
        means = result.layers[kept].join(drawn.means_of_layers(result))
        listed = table(means, titles=known) if len(means) <= ROWS else document.table(means, "means", known)
        by["Overview"].append(f"<div><h3>Means over units</h3>{listed}</div>")
    if values_of(result.units):
        by["Units"].append(explorer(document, result, known))
    return [part for title, inner in by.items() for part in section(title, inner)]


def analyses(document: Document, folder: Path, names: Iterable[str], title: str | None = None) -> list[str]:
    """One section per analysis in a subfolder: what it found, its figures, and what is missing. title: None is that of its kind."""
    from nodelens.analysis.registry import load_analysis

    parts: list[str] = []
    for name in names:
        found: Any = load_analysis(folder / name)
        words = "".join(f"<li>{html.escape(line)}</li>" for line in found.summary().splitlines())
        gaps = found.metadata.get("missing") if isinstance(found, Findings) else None
        lost = [table(pd.DataFrame(gaps).set_index("layer"), words=True)] if gaps else []
        plots = [replace(plot, name=f"{name}-{plot.name}") for plot in plots_of(found)]
        parts += section(
            title or title_of(found, name),
            [f"<ul>{words}</ul>" if words else "", *map(document.plot, plots), *lost],
        )
    return parts


def write_figures(folder: str | Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Writes the figures of a saved analysis, and their data as CSV, into its subfolder ``figures``.

    Returns the paths of the figures.
    Raises FileNotFoundError for a folder without a finished analysis.
    """
    from nodelens.analysis.registry import load_analysis

    from .paper import write_plots

    return write_plots(plots_of(load_analysis(folder)), Path(folder) / "figures", formats)
