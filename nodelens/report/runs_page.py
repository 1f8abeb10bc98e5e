"""One page over many runs: their settings and scores, metrics against the settings, and what analyses say over all of them."""

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from nodelens.results.result import values_of
from nodelens.results.runs import load_runs

from . import runs_figures as figures
from .document import Document, block
from .elements import cards, contents, section
from .settings import choices_of, is_seed, settings_of, usual
from .unit_data import VALUES

_MOST = 8_000_000  # values of all runs that a page offers unit by unit


def compare(runs: str | Path | Sequence[str | Path], to: str | Path = "comparison", plotly: str = "shared") -> Path:
    """Writes one interactive page over many runs, ``index.html`` in the folder ``to``; returns its path.

    runs: folders or patterns, such as ``outputs/**``, of ``analyze.py`` and ``Result.save``. plotly: where the script that draws
    is, as for the page of a run

    The page shows which settings differ, the scores and metrics against each of them (means over runs with 95 % intervals by
    Student's t; the other settings at their most frequent choice), the differences of any two runs unit by unit, how alike runs
    with other seeds rank units or layers, and, where the runs have an analysis of modules, the modularity against each setting,
    the association matrices sorted by module and the alignment of modules between associations.

    Raises FileNotFoundError if no run matches, and warns of a run that cannot be read, which is left out.
    """
    folder = Path(to)
    units = load_runs(runs)
    layers = _by_layer(units)
    settings, document = settings_of(layers), Document(folder / "index.html", plotly)
    parts = section("Runs", [_runs(document, layers, settings)])
    parts += _scores(document, layers, settings)
    parts += _metrics(document, layers, settings)
    parts += section("Two runs, unit by unit", [_differences(document, units, layers.attrs["metrics"])])
    parts += _seeds(document, units, layers, settings)
    for name, draw in _sections().items():
        having = [run for run in layers["run"].unique() if (Path(run) / name / "metadata.json").is_file()]
        parts += draw(document, having) if having else []
    return document.write([*_head(layers, settings), contents(parts), *parts], "nodelens: runs compared")


def _by_layer(units: pd.DataFrame) -> pd.DataFrame:
    """One row per layer and run: means of the metrics over units, settings and scores."""
    about = ["run", "layer", "unit", *units.attrs["settings"], *units.attrs["scores"]]
    metrics = values_of(units.drop(columns=about))
    by = units.groupby(["run", "layer"], sort=False)
    found = by[metrics].mean().join(by[about[3:]].first()).reset_index()
    found.attrs = units.attrs | {"metrics": metrics}
    return found


def _head(frame: pd.DataFrame, settings: Sequence[str]) -> list[str]:
    varied = [f"{c}: {', '.join(map(str, choices_of(frame[c])[:8]))}" for c in settings]
    count = frame["run"].nunique()
    lead = f"{count} runs; {'; '.join(varied) or 'no setting differs but the seed'}"
    numbers = {
        "runs": count,
        "layers": frame["layer"].nunique(),
        "metrics": len(frame.attrs["metrics"]),
        "settings that differ": len(settings),
    }
    return ["<h1>nodelens: runs compared</h1>", f"<p class='lead'>{html.escape(lead)}</p>", cards(numbers)]


def _runs(document: Document, frame: pd.DataFrame, settings: Sequence[str]) -> str:
    shown = [*settings, *filter(is_seed, frame.attrs["settings"]), *frame.attrs["scores"]]
    return document.table(frame.drop_duplicates("run").set_index("run")[shown], "runs")


def _scores(document: Document, frame: pd.DataFrame, settings: Sequence[str]) -> list[str]:
    rows = frame.drop_duplicates("run")
    known = [score for score in ("accuracy", "perplexity", "loss") if score in rows and rows[score].nunique() > 1]
    if not known or not settings:
        return []
    plots = [figures.against_settings(rows, [score], settings, None, usual(rows, settings)) for score in known]
    return section("Scores", [document.plot(plot) for plot in plots])


def _metrics(document: Document, frame: pd.DataFrame, settings: Sequence[str]) -> list[str]:
    names = frame.attrs["metrics"]
    if not names:
        return []
    parts = []
    if settings:
        parts.append(document.plot(figures.against_settings(frame, names, settings, "layer", usual(frame, settings))))
    found = frame.groupby("layer", sort=False)[names].agg(["mean", "std"])
    found.columns = [f"{name}, {'mean' if how == 'mean' else 'sd over runs'}" for name, how in found.columns]
    return section("Metrics", [*parts, "<h3>Means over runs</h3>", document.table(found, "metrics")])


def _differences(document: Document, units: pd.DataFrame, metrics: Sequence[str]) -> str:
    """The part of a page in which two runs and a metric are chosen; empty for one run, and without metrics."""
    runs = list(dict.fromkeys(units["run"]))
    if len(runs) < 2 or not metrics:
        return ""
    kept = [*metrics, *(f"{name}_se" for name in metrics if f"{name}_se" in units)]
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


def _seeds(document: Document, units: pd.DataFrame, layers: pd.DataFrame, settings: Sequence[str]) -> list[str]:
    """Ranks across seeds: of units where runs are of the same weights, else of layers."""
    same = [c for c in ("ckpt_path", "model.weights") if c not in units.attrs["settings"]]
    varied = [c for c in units.attrs["settings"] if is_seed(c)]
    if not varied or not layers.attrs["metrics"]:
        return []
    trained = any(str(c).startswith("trained_by.") for c in varied) or len(same) < 2
    given = units.attrs["constant"].get("ckpt_path") or units.attrs["constant"].get("model.weights")
    of = "unit" if given and not trained else "layer"
    table = figures.rank_stability(units if of == "unit" else layers, layers.attrs["metrics"], settings, of)
    return section("Ranks across seeds", [document.plot(figures.stability(table, of))]) if table.notna().any(axis=None) else []


def _sections() -> dict[str, Callable[[Document, Any], list[str]]]:
    """The sections of analyses over runs, by name."""
    from .modularity_runs import modularity_over_runs

    return {"modularity": modularity_over_runs}
