"""The HTML page of a training: its loss and accuracy, and what the measurement after each epoch says about its units."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from nodelens.results.files import read_json
from nodelens.results.training_history import HISTORY, read_history
from nodelens.results.trends import common_metrics, epoch_tables, trends_of

from .charts import band, line, lines_of, panels, spread
from .document import Document, block
from .elements import cards, command, contents, section
from .headline import command_of, data_words, scores
from .page import analyses
from .plot import Plot, colour, figure_of, menu, text, whole_ticks

_VALUES = 20_000_000  # of units over epochs that a page offers
_LAYERS = 16  # lines of a figure


def write_training_page(folder: str | Path, plotly: str = "shared", figures: Sequence[str] = ()) -> Path:
    """Writes ``report.html`` of a training: loss and accuracy, units over epochs, stability of their ranks, modules over time.

    What it reads: ``result.json``, ``history.csv`` (in folders of earlier versions the log of ``logger=csv``), and the tables of
    ``callbacks=measure``. plotly, figures: as for the page of a measurement. Raises FileNotFoundError for a folder without a
    finished training.
    """
    folder = Path(folder)
    if not (folder / "result.json").is_file():
        raise FileNotFoundError(f"{folder} has no finished training: result.json is missing")
    document = Document(folder / "report.html", plotly, figures)
    history = history_of(folder)
    lead = "" if len(history) else "The run has no history.csv: an earlier version wrote it, without logger=csv."
    parts = section("Loss and accuracy", [document.plot(progress(history))] if len(history) else ["<div></div>"], lead)
    tables = epoch_tables(folder) if list((folder / "epochs").glob("units_*.parquet")) else {}
    if tables:
        parts += section("Units over epochs", [*map(document.plot, over_epochs(tables)), _units(document, tables)])
        parts += section("Emergence of structure", [document.plot(plot) for plot in _stability(tables)])
    over = sorted(path.parent.name for path in folder.glob("epochs/*/metadata.json"))
    parts += analyses(document, folder / "epochs", over)
    for name, last in _last_epochs(folder / "epochs", over).items():
        parts += analyses(document, folder / "epochs" / name, [last], f"{name.capitalize()}, after epoch {int(last)}")
    return document.write([*_head(folder, tables), contents(parts), *parts], f"nodelens: {folder.name}")


def _last_epochs(folder: Path, over: Sequence[str]) -> dict[str, str]:
    """{analysis: folder of its last epoch}, of those that say nothing about all epochs."""
    found = sorted(path.parent for path in folder.glob("*/*/metadata.json") if path.parent.name.isdecimal())
    return {place.parent.name: place.name for place in found if place.parent.name not in over}


def history_of(folder: Path) -> pd.DataFrame:
    """One row per epoch: the means of what was logged under train/ and val/.

    Earlier versions wrote a CSV file per start of a training: of a value that several logged, the last counts.
    """
    if len(kept := read_history(folder / HISTORY)):
        return kept
    found = []
    starts = {int(m[1]): place for place in folder.glob("csv/version_*") if (m := re.fullmatch(r"version_(\d+)", place.name))}
    for file in (starts[k] / "metrics.csv" for k in sorted(starts)):
        if not file.is_file():
            continue
        logged = pd.read_csv(file)
        chosen = [c for c in logged if str(c).startswith(("train/", "val/"))]
        if "epoch" in logged and chosen:
            found.append(logged.groupby("epoch")[chosen].mean())
    if not found:
        return pd.DataFrame()
    return pd.concat(found).groupby(level="epoch").last().dropna(how="all")  # of each column the last value that there is


def progress(history: pd.DataFrame) -> Plot:
    """Loss and accuracy by epoch, for training and validation."""
    kinds = {_WORDS.get(kind, kind): kind for kind in (str(c).partition("/")[2] for c in history if "/" in str(c))}

    def draw(words: Any) -> list[dict[str, Any]]:
        kind = kinds[words]
        sides = [side for side in ("train", "val") if f"{side}/{kind}" in history]
        return [line(history.index, history[f"{side}/{kind}"], side, k) for k, side in enumerate(sides)]

    figure = panels(list(kinds), draw, "epoch", height=280, shared=False, axes={"x": whole_ticks(history.index)})
    return Plot("progress", "How the training went", f"Means over each epoch.{_resumed(history)}", figure, history.reset_index())


def _resumed(history: pd.DataFrame) -> str:
    """A sentence about the epochs within which the training was resumed."""
    batches = history.get("batches", pd.Series(dtype=int))
    cut = [str(epoch) for epoch, count in batches.items() if count < batches.max()]
    words = "Training was resumed within epoch {}: its means for train are over the batches after that."
    return f" {words.format(', '.join(cut))}" if cut else ""


def over_epochs(tables: Mapping[int, pd.DataFrame]) -> list[Plot]:
    """The mean of each metric over the units of each layer, by epoch, with the quartiles of the units."""
    epochs = list(tables)
    names = common_metrics(tables)
    parts = {epoch: table[names].groupby(level="layer", sort=False) for epoch, table in tables.items()}
    kinds = {
        how: pd.concat({epoch: _of(by, how) for epoch, by in parts.items()}, names=["epoch"]) for how in ("mean", "low", "high")
    }
    layers = list(dict.fromkeys(kinds["mean"].index.get_level_values("layer")))
    shown = spread(layers, _LAYERS)
    traces = []
    for number, name in enumerate(names):
        for k, layer in enumerate(shown):
            mean, low, high = (kinds[how].xs(layer, level="layer")[name].to_numpy() for how in ("mean", "low", "high"))
            group = {"legendgroup": text(layer), "visible": number == 0}
            traces += [band(epochs, low, high, shade=colour(k), showlegend=False, **group), line(epochs, mean, layer, k, **group)]
    each = 2 * len(shown)
    visible = [[number * each <= k < (number + 1) * each for k in range(len(traces))] for number in range(len(names))]
    menus = [menu(names, visible, [{"yaxis.title.text": text(n)} for n in names]) | {"name": "metric"}] if len(names) > 1 else []
    axes = {
        "xaxis": {"title": {"text": "epoch"}, **whole_ticks(epochs)},
        "yaxis": {"title": {"text": text(names[0]) if names else ""}},
    }
    table = kinds["mean"].reset_index()
    return (
        [Plot("epochs", "How each layer develops", _EPOCHS, figure_of(traces, 440, **axes, updatemenus=menus), table)]
        if names
        else []
    )


def _of(by: Any, how: str) -> pd.DataFrame:
    return by.mean() if how == "mean" else by.quantile(0.25 if how == "low" else 0.75)


def _units(document: Document, tables: Mapping[int, pd.DataFrame]) -> str:
    """The part of a page in which a metric and a layer are chosen: every unit over the epochs."""
    first = next(iter(tables.values()))
    names = common_metrics(tables)
    if not names:
        return ""
    if len(first) * len(names) * len(tables) > _VALUES:
        return "<p>The units are too many for a page: nl.score_trends reads the tables of the epochs.</p>"
    for k, name in enumerate(names):
        frame = pd.DataFrame({str(epoch): table[name].to_numpy(float) for epoch, table in tables.items()}, index=first.index)
        document.embed(f"epochs-{k}", block(frame))
    layers = [str(name) for name in dict.fromkeys(first.index.get_level_values("layer"))]
    document.embed("epochs", {"metrics": names, "layers": layers, "epochs": list(tables), "ticks": whole_ticks(tables)})
    return (
        "<div data-widget='epochs'><h3>Every unit over epochs</h3><div class='menus'></div>"
        "<p class='soft'>One line per unit, "
        "blue where its last value is low and orange where it is high; of many, 200 are drawn. The thick line is the median.</p>"
        "<div class='canvas' style='min-height:440px' role='img' tabindex='0' aria-label='Units over epochs'></div></div>"
    )


def _stability(tables: Mapping[int, pd.DataFrame]) -> list[Plot]:
    """How early the ranks of units are those of the last epoch."""
    if len(tables) < 2 or not common_metrics(tables):
        return []
    ranks = trends_of(tables)["ranks"]
    means = ranks.groupby(["metric", "epoch"], sort=False)[["with_last", "top_overlap"]].mean().reset_index()
    words = {"with_last": "Spearman with the last epoch", "top_overlap": "share of the last top 10 %"}

    def draw(label: Any) -> list[dict[str, Any]]:
        return lines_of(means, "epoch", next(c for c, each in words.items() if each == label), "metric")

    figure = panels(list(words.values()), draw, "epoch", height=320, shared=False, axes={"x": whole_ticks(means["epoch"])})
    return [Plot("stability", "When the order of the units is settled", _STABILITY, figure, ranks)]


def _head(folder: Path, tables: Mapping[int, pd.DataFrame]) -> list[str]:
    found = read_json(folder / "result.json")
    numbers = {f"test {name}": value for name, value in scores(found | {"split": "test"}).items()}
    numbers |= {"epochs": str(found.get("epochs", "?")), "epochs measured": str(len(tables))}
    words = command_of(folder, "train")
    about = [*_settings_words(folder), f"checkpoint {found['checkpoint']}" if found.get("checkpoint") else "no checkpoint"]
    lead = f"<p class='lead'>{html.escape('; '.join(about))}</p>"
    return ["<h1>nodelens train</h1>", lead, cards(numbers), *([command(words)] if words else [])]


def _settings_words(folder: Path) -> list[str]:
    """Model and data of a training, from its settings; nothing where they cannot be read."""
    try:
        config = read_json(folder / "settings.json")
    except (OSError, ValueError):
        return []
    net = str(((config.get("model") or {}).get("net") or {}).get("_target_", "")).rpartition(".")[2]
    return [*([net] if net else []), *data_words({"config": config})]


_WORDS = {"acc": "accuracy", "ppl": "perplexity"}  # of what is logged under a short name
_EPOCHS = "Lines are means over the units of a layer, bands reach from the lower to the upper quartile of the units."
_STABILITY = (
    "Means over layers. Left: rank correlation of the units' values with those of the last epoch. Right: share of the last epoch's "
    "top tenth that is in the top tenth already."
)
