"""The HTML report page of a finished run."""

import html
import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from nodelens.results.files import write
from nodelens.results.findings import Findings
from nodelens.results.notices import notices
from nodelens.results.result import Result, load, values_of

from .elements import figure, figure_file, section, table, write_html

_TITLES = {"geometry": "Geometry of the residual stream"}  # where it is not the name


def write_page(folder: str | Path) -> Path:
    """Writes ``report.html`` with embedded figures, and the figures as files in ``figures/``, from the files of a run.

    Raises FileNotFoundError for a folder without a finished run.
    """
    from . import figures

    folder = Path(folder)
    result = load(folder)
    parts = [_head(result), *_warnings(result)]
    if values_of(result.units):
        parts += section(
            "Units",
            [
                figure(folder, "units", figures.distributions(result), _UNITS),
                figure(folder, "agreement", figures.agreement(result), _AGREEMENT),
            ],
        )
    if _layer_metrics(result):
        parts += section("Layers", [figure(folder, "layers", figures.layers(result), _LAYERS)])
    if len(result.edges) and result.edges[values_of(result.edges)].notna().any(axis=None):
        parts += section("Layer pairs", [figure(folder, "edges", figures.edges(result), _EDGES)])
    if len(result.layers):
        parts += section("Means over units", [table(_means(result))])
    parts += _analyses(folder, result.metadata.get("analyses") or [])
    if result.metadata["metrics"]:
        parts += section("Definitions", [_definitions(result)])
        parts += section("Missing values and their reasons", [_missing(result)])
    return write_html(folder / "report.html", parts)


def _analyses(folder: Path, names: Iterable[str]) -> list[str]:
    """One section per analysis of the run: what it found, its figures, and what is missing."""
    from nodelens.analysis.registry import list_analyses, load_analysis

    parts: list[str] = []
    for name in names:
        found = load_analysis(folder / name)
        title, draw = _drawn(found)
        words = [f"<p>{html.escape(line)}</p>" for line in found.summary().splitlines()]
        figures = [figure(folder, f"{name}-{which}", png, text) for which, png, text in draw(found)]
        missing = found.metadata.get("missing") if isinstance(found, Findings) else None
        gaps = [table(pd.DataFrame(missing).set_index("layer"), words=True)] if missing else []
        own = _TITLES.get(name, name.replace("_", " ").capitalize()) if name in list_analyses() else f"{title}: {name}"
        parts += section(own, [*words, *figures, *gaps])
    return parts


def write_figures(folder: str | Path) -> list[Path]:
    """Draws the figures of a saved analysis into its subfolder ``figures``; returns their paths, none where it has no figures.

    Raises FileNotFoundError for a folder without a finished analysis.
    """
    from nodelens.analysis.registry import load_analysis

    found, paths = load_analysis(folder), []
    for name, png, _ in _drawn(found)[1](found):
        paths.append(figure_file(Path(folder), name))
        write(paths[-1], partial(Path.write_bytes, data=png))
    return paths


def _kind(found: Any) -> str:
    """The name of an analysis in the registry, by its result."""
    return found.kind if isinstance(found, Findings) else type(found).__name__.removesuffix("Result").lower()


def _drawn(found: Any) -> tuple[str, Callable[[Any], Iterable[tuple[str, bytes, str]]]]:
    """The title of an analysis, and the function that draws what it found, ``figures_of`` in ``<name>_figures.py``."""
    kind = _kind(found)
    title = _TITLES.get(kind, kind.replace("_", " ").capitalize())
    if importlib.util.find_spec(f"nodelens.report.{kind}_figures") is None:
        return title, lambda found: ()
    return title, importlib.import_module(f"nodelens.report.{kind}_figures").figures_of


def write_pruning_page(folder: str | Path) -> Path:
    """The page of a pruning run: curves, ranking, groups, scores. Raises FileNotFoundError for a folder without a finished run."""
    from . import figures

    folder = Path(folder)
    result = load(folder)
    sweep = pd.read_parquet(folder / "sweep.parquet")
    parts = [_head(result), *_warnings(result)]
    parts += section("Pruning", [figure(folder, "curves", figures.curves(sweep), _CURVES), _sweep_table(sweep)])
    parts += section("Pruning groups", [table(result.layers)])
    frozen = result.metadata.get("frozen") or []
    parts += section("Frozen groups", [table(pd.DataFrame(frozen).set_index("what"), words=True)]) if frozen else []
    if values_of(result.units):
        scores = [figure(folder, "units", figures.distributions(result), _UNITS)]
        parts += section("Scores", [*scores, figure(folder, "agreement", figures.agreement(result), _AGREEMENT)])
        parts += section("Definitions", [_definitions(result)])
    return write_html(folder / "report.html", parts)


_CURVES = (
    "Test accuracy (language models: perplexity) against the share of multiply-accumulates (MACs) removed. Bands are one standard "
    "deviation over seeds; the dotted line is the dense network. A cross at the upper edge stands for a perplexity that is "
    "infinite or not a number. In the table, area is the mean of a curve up to the share that every curve reaches; the columns "
    "are requested amounts."
)
_UNITS = "Distribution of each metric over the units of a layer. Boxes show the quartiles, whiskers 1.5 interquartile ranges."
_AGREEMENT = (
    "Spearman correlation between metrics over the units of a layer, averaged over layers with the number of units as weights; "
    "grey where a metric is constant."
)
_LAYERS = "Metrics of layers with one jackknife standard error; the number of units is in parentheses."
_EDGES = (
    "Metrics of layer pairs with one jackknife standard error. Rows are positions if both layers have the same, else samples "
    "(means over positions)."
)


def _head(result: Result) -> str:
    m = result.metadata
    config, found = m.get("config") or {}, m.get("evaluation")
    name = m.get("model", {}).get("class", "model")
    lead = [name]
    if len(result.layers):
        lead = [
            f"{name} with {len(result.units):,} units in {len(result.layers)} layers",
            f"measured on {m['samples']:,} samples of the split {m.get('data', {}).get('split', '?')}",
        ]
    lead.append(f"seed {m.get('seed')}")
    if found:
        lead.append(_score(found))
    model = config.get("model") or {}
    stored = [model.get("weights"), *((model.get("net") or {}).get(key) for key in ("path", "pretrained"))]
    if not (m.get("weights") or {}).get("ckpt_path") and not any(stored):
        lead.append("no checkpoint was given")
    return f"<h1>nodelens {html.escape(str(config.get('task', '')))}</h1><p class='lead'>{html.escape('; '.join(lead))}</p>"


def _score(found: Mapping[str, Any]) -> str:
    """An evaluation in words: accuracy or, of a task without classes, the loss, and for texts the perplexity. None is NaN."""
    found = {name: math.nan if value is None else value for name, value in found.items()}
    on = f"on {found['samples']:,} samples of the split {found['split']}"
    if "accuracy" not in found:
        return f"loss {found['loss']:.4f} {on}"
    accuracy = f"accuracy {100 * found['accuracy']:.2f} % {on}"
    return f"perplexity {found['perplexity']:.3f}, next-token {accuracy}" if "perplexity" in found else accuracy


def _warnings(result: Result) -> list[str]:
    return [f"<p class='warning'>Warning: {html.escape(line)}</p>" for line in notices(result.metadata)]


def _layer_metrics(result: Result) -> list[str]:
    return [c for c in values_of(result.layers) if result.layers[c].notna().any()]


def _means(result: Result) -> pd.DataFrame:
    means = result.units[values_of(result.units)].groupby(level="layer", sort=False).mean()
    return result.layers[["type", "units"]].join(means).join(result.layers[_layer_metrics(result)])


def _sweep_table(sweep: pd.DataFrame) -> str:
    from nodelens.pruning.sweep.ranking import areas, curves

    area = areas(sweep)
    means = curves(sweep)["mean"].unstack("amount").loc[area.index]
    frame = area[["area"]].join(means.rename(columns=lambda a: f"{a:g}")).reset_index()
    return table(frame.set_index("criterion"))


def _definitions(result: Result) -> str:
    rows = {
        column: {
            "metric": m["metric"],
            "options": ", ".join(f"{k}={v}" for k, v in m["options"].items()) or "none",
            "reads": (", ".join(m["needs"].values()) or "weights") + _without_activation(m),
            "source": m.get("source", ""),
        }
        for column, m in result.metadata["metrics"].items()
    }
    return table(pd.DataFrame(rows).T.rename_axis("column"), words=True)


def _without_activation(metric: dict[str, Any]) -> str:
    """At which layers a metric that reads behind the activation read the layer's own output."""
    layers = [layer for layer, behind in metric.get("read_behind", {}).items() if not behind]
    return f"; no activation follows {', '.join(layers)}: read at the output" if layers else ""


def _missing(result: Result) -> str:
    entries = result.metadata.get("missing", [])
    if not entries:
        return "<p>None: every unit and layer has a value for every metric.</p>"
    return table(pd.DataFrame(entries).set_index("layer"), words=True)
