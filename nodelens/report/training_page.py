"""The HTML page of a training: its loss and accuracy, and what the measurement after each epoch says about its units."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from nodelens.analysis.load import epoch_analyses
from nodelens.results.files import read_json
from nodelens.results.training_history import history_of
from nodelens.results.trends import common_metrics, epoch_files, epoch_tables

from .document import Document, block
from .elements import cards, command, contents, section
from .headline import command_of, data_words, scores
from .page import analyses
from .plot import whole_ticks
from .training_figures import UNITS_OVER_EPOCHS, loss, over_epochs, stability

_VALUES = 20_000_000  # of units over epochs that a page offers


def write_training_page(folder: str | Path, plotly: str = "shared", figures: Sequence[str] = ()) -> Path:
    """Writes ``report.html`` of a training: loss and accuracy, units over epochs, stability of their ranks, modules over time.

    What it reads: ``result.json``, ``history.csv`` (in folders of earlier versions the log of ``logger=csv``), and the tables of
    ``callbacks=measure``. plotly, figures: as for the page of a measurement. Raises FileNotFoundError for a folder without a
    finished training.
    """
    folder = Path(folder)
    if not (folder / "result.json").is_file():
        raise FileNotFoundError(f"{folder} has no finished training: result.json is missing; run its command again to continue it")
    document = Document(folder / "report.html", plotly, figures)
    history = history_of(folder)
    lead = "" if len(history) else "The run has no history.csv: an earlier version wrote it, without logger=csv."
    parts = section("Loss and accuracy", [document.plot(loss(history))] if len(history) else ["<div></div>"], lead)
    tables = epoch_tables(folder) if epoch_files(folder) else {}
    if tables and common_metrics(tables):
        parts += section("Units over epochs", [document.plot(over_epochs(tables)), _units(document, tables)])
        parts += section("Emergence of structure", [document.plot(stability(tables))] if len(tables) > 1 else [])
    for name, place in epoch_analyses(folder).items():
        title = None if place.name == name else f"{name.capitalize()}, after epoch {int(place.name)}"
        parts += analyses(document, place.parent, [place.name], title)
    return document.write([*_head(folder, tables), contents(parts), *parts], f"nodelens: {folder.name}")


def _units(document: Document, tables: Mapping[int, pd.DataFrame]) -> str:
    """The part of a page in which a metric and a layer are chosen: every unit over the epochs."""
    first = next(iter(tables.values()))
    names = common_metrics(tables)
    if len(first) * len(names) * len(tables) > _VALUES:
        return "<p>The units are too many for a page: nl.score_trends reads the tables of the epochs.</p>"
    for k, name in enumerate(names):
        frame = pd.DataFrame({str(epoch): table[name].to_numpy(float) for epoch, table in tables.items()}, index=first.index)
        document.embed(f"epochs-{k}", block(frame))
    layers = [str(name) for name in dict.fromkeys(first.index.get_level_values("layer"))]
    document.embed("epochs", {"metrics": names, "layers": layers, "epochs": list(tables), "ticks": whole_ticks(tables)})
    return (
        "<div data-widget='epochs'><h3>Every unit over epochs</h3><div class='menus'></div>"
        f"<p class='soft'>{UNITS_OVER_EPOCHS}</p>"
        "<div class='canvas' style='min-height:440px' role='img' tabindex='0' aria-label='Units over epochs'></div></div>"
    )


def _head(folder: Path, tables: Mapping[int, pd.DataFrame]) -> list[str]:
    found = read_json(folder / "result.json")
    words = command_of(folder, "train")
    about = [*_settings_words(folder), f"checkpoint {found['checkpoint']}" if found.get("checkpoint") else "no checkpoint"]
    lead = f"<p class='lead'>{html.escape('; '.join(about))}</p>"
    return ["<h1>nodelens train</h1>", lead, cards(numbers_of(found, len(tables))), *([command(words)] if words else [])]


def numbers_of(score: dict[str, Any], measured: int) -> dict[str, str]:
    """Headlines of a training: its test scores, epochs, and the number of those that were measured. score: of ``result.json``."""
    found = {f"test {name}": value for name, value in scores(score | {"split": "test"}).items()}
    return found | {"epochs": str(score.get("epochs", "?")), "epochs measured": str(measured)}


def _settings_words(folder: Path) -> list[str]:
    """Model and data of a training, from its settings; nothing where they cannot be read."""
    try:
        config = read_json(folder / "settings.json")
    except (OSError, ValueError):
        return []
    net = str(((config.get("model") or {}).get("net") or {}).get("_target_", "")).rpartition(".")[2]
    return [*([net] if net else []), *data_words({"config": config})]
