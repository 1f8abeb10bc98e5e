"""Plots of modules over a training: modularity after each epoch, and how many units stay in their modules."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from nodelens.results.findings import Findings

from .charts import grid, line, panels
from .epoch_pictures import epoch_ticks, pictures, ranked
from .plot import COLOURS, GREY, Plot, whole_ticks

_COLOURED = 6  # modules of a picture with colours of their own


def figures_of(found: Findings) -> Iterator[Plot]:
    """The plots over the epochs of a training."""
    if not len(found["modules"]):
        return
    yield Plot("q", "Do modules emerge?", _Q, _lines(found["modules"]), found["modules"])
    if len(found["stability"]):
        yield Plot("stability", "Do units stay in their modules?", _STABILITY, _stability(found["stability"]), found["stability"])
    if len(found["labels"]):
        yield Plot("units", "Which units stay together?", _UNITS, _units(found["labels"]), found["labels"])


def _units(labels: pd.DataFrame) -> Any:
    """The module of each unit after each epoch, one picture per layer and association."""
    tables, words = {}, {}
    for (layer, name), rows in labels.groupby(["layer", "association"], sort=False):
        numbers = rows.pivot(index="unit", columns="epoch", values="module")
        tables[f"{layer}, {name}"] = ranked(numbers, _COLOURED)
        words[f"{layer}, {name}"] = numbers.map(lambda module: "in no module" if module < 0 else f"module {module:g}")
    return pictures(tables, words, (*COLOURS[:_COLOURED], GREY), "modules of")


def _stability(table: pd.DataFrame) -> Any:
    """Adjusted mutual information of the modules of consecutive epochs: one row per layer and association."""
    rows = table.assign(row=table["layer"] + ", " + table["association"])
    values = rows.pivot(index="row", columns="epoch_b", values="ami").loc[list(dict.fromkeys(rows["row"]))]
    figure = grid(values, "adjusted mutual information", "epoch", "layer, association", limits=(0, 1))
    return figure.update_layout(xaxis=epoch_ticks(list(values.columns)))


def _lines(table: pd.DataFrame) -> Any:
    """Modularity and the number of modules, one line per layer and association."""

    def draw(words: Any) -> list[dict[str, Any]]:
        found = []
        for k, ((layer, name), rows) in enumerate(table.groupby(["layer", "association"], sort=False)):
            found.append(line(rows["epoch"], rows[_COLUMNS[words]], f"{layer}, {name}", k))
            if _COLUMNS[words] == "q" and "q_null" in rows:
                null: dict[str, Any] = {"mode": "lines", "showlegend": False, "opacity": 0.7}
                found.append(line(rows["epoch"], rows["q_null"], f"{layer}, {name}", k, **null))
                found[-1]["line"] = found[-1]["line"] | {"dash": "dot"}
        return found

    return panels(list(_COLUMNS), draw, "epoch", height=320, shared=False, axes={"x": whole_ticks(table["epoch"])})


_COLUMNS = {"modularity Q": "q", "number of modules": "modules"}
_Q = "Modularity and number of modules after each epoch. Dotted: modularity found in random graphs of the null model."
_STABILITY = (
    "How alike the modules of an epoch and those of the one before are: adjusted mutual information. 1: no unit moved; 0: no more "
    "alike than by chance."
)
_UNITS = (
    "One row per unit, one column per epoch. A module keeps its colour while its units stay; the six largest modules, those of the "
    "last epoch first, have colours of their own, all others are grey. Empty: in no module."
)
