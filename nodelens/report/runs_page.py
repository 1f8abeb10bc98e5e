"""One page over many runs: their settings and scores, metrics against the settings, and what analyses say over all of them."""

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from nodelens.results.result import values_of
from nodelens.results.runs import load_runs

from . import runs_figures as figures
from .elements import figure, section, table, write_html
from .settings import is_seed, settings_of, usual

ROWS = 200  # of a table that a page shows


def compare(runs: str | Path | Sequence[str | Path], to: str | Path = "comparison") -> Path:
    """Writes one page over many runs, ``index.html`` in the folder ``to``, with its figures and tables beside it; returns its path.

    runs: folders or patterns, such as ``outputs/**``, of ``analyze.py`` and ``Result.save``

    The page shows which settings differ, the scores and metrics against each of them (means over runs with 95 % intervals by
    Student's t; the other settings at their most frequent choice), and, where the runs have an analysis of modules, the modularity
    against each setting, the association matrices sorted by module and the alignment of modules between associations.

    Raises FileNotFoundError if no run matches, and warns of a run that cannot be read, which is left out.
    """
    folder = Path(to)
    layers = _by_layer(runs)
    settings = settings_of(layers)
    parts = _head(layers, settings)
    parts += section("Runs", [_runs(layers, settings)])
    parts += _scores(folder, layers, settings)
    parts += _metrics(folder, layers, settings)
    for name, draw in _sections().items():
        if any((Path(run) / name / "metadata.json").is_file() for run in layers["run"].unique()):
            parts += draw(folder, runs)
    return write_html(folder / "index.html", parts)


def _by_layer(runs: Any) -> pd.DataFrame:
    """One row per layer and run: means of the metrics over units, settings and scores."""
    units = load_runs(runs)
    about = ["run", "layer", "unit", *units.attrs["settings"], *units.attrs["scores"]]
    metrics = values_of(units.drop(columns=about))
    chosen = {c: "mean" if c in metrics else "first" for c in (*metrics, *about[3:])}
    found = units.groupby(["run", "layer"], sort=False).agg(chosen).reset_index()
    found.attrs = units.attrs | {"metrics": metrics}
    return found


def _head(frame: pd.DataFrame, settings: Sequence[str]) -> list[str]:
    varied = [f"{c}: {', '.join(map(str, sorted(frame[c].unique(), key=str)[:8]))}" for c in settings]
    lead = f"{frame['run'].nunique()} runs; {'; '.join(varied) or 'no setting differs but the seed'}"
    return ["<h1>nodelens: runs compared</h1>", f"<p class='lead'>{html.escape(lead)}</p>"]


def _runs(frame: pd.DataFrame, settings: Sequence[str]) -> str:
    shown = [*settings, *filter(is_seed, frame.attrs["settings"]), *frame.attrs["scores"]]
    rows = frame.drop_duplicates("run").set_index("run")[shown]
    more = f"<p>The first {ROWS} of {len(rows):,} runs.</p>" if len(rows) > ROWS else ""
    return more + table(rows.head(ROWS))


def _scores(folder: Path, frame: pd.DataFrame, settings: Sequence[str]) -> list[str]:
    rows = frame.drop_duplicates("run")
    drawn = []
    for score in ("accuracy", "perplexity", "loss"):
        if score in rows and settings and rows[score].nunique() > 1:
            png = figures.against_settings(rows, score, settings, None, usual(rows, settings))
            drawn.append(figure(folder, score, png, f"{score.capitalize()} against each setting. {_MEANS}"))
    return section("Scores", drawn[:1]) if drawn else []


def _metrics(folder: Path, frame: pd.DataFrame, settings: Sequence[str]) -> list[str]:
    names = frame.attrs["metrics"]
    if not names:
        return []
    parts = []
    for k, name in enumerate(names[:12] if settings else []):
        png = figures.against_settings(frame, name, settings, "layer", usual(frame, settings))
        parts.append(figure(folder, f"metric-{k}", png, f"{name}: means over the units of a layer. {_MEANS}"))
    found = frame.groupby("layer", sort=False)[names].agg(["mean", "std"])
    found.columns = [f"{name}, {'mean' if how == 'mean' else 'sd over runs'}" for name, how in found.columns]
    return section("Metrics", [*parts, table(found)])


_MEANS = "Means over runs with 95 % intervals; the other settings have their most frequent choice."


def _sections() -> dict[str, Callable[[Path, Any], list[str]]]:
    """The sections of analyses over runs, by name."""
    from .modularity_runs import modularity_over_runs

    return {"modularity": modularity_over_runs}
