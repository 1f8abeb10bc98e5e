"""Plots of the analysis ``supernode_lesions``, made from its tables."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from nodelens.results.findings import Findings

from .charts import dots, lines_of, panels
from .plot import GREY, Plot, figure_of, rows_axis, rows_height


def figures_of(found: Findings) -> Iterator[Plot]:
    """The plots of an analysis."""
    if len(found["sets"]):
        yield Plot("sets", "Do supernodes, their halo and their readers matter?", _SETS, sets(found["sets"]), found["sets"])
    if len(found["dose"]):
        yield Plot("dose", "Does damage rise with the share of supernodes?", _DOSE, dose(found["dose"]), found["dose"])


def sets(table: pd.DataFrame) -> Any:
    """Damage of each set and of its control by layer, one panel per kind of set."""
    given = table["given"].where(table["given"] == "", ", " + table["given"] + " removed")
    titles = table["set"] + given + " and " + table["control"]
    layers = list(dict.fromkeys(table["layer"]))

    def draw(title: object) -> list[dict[str, Any]]:
        own = table[titles == title]
        place = own["layer"].map(layers.index).to_numpy()
        interval = {"array": own["high"] - own["control_damage"], "arrayminus": own["control_damage"] - own["low"], "color": GREY}
        control = dots(own["control_damage"], place, "control, 95 %", marker={"color": GREY, "size": 5})
        return [control | {"error_x": interval | {"thickness": 2}}, dots(own["damage"], place, "removed")]

    return panels(
        list(dict.fromkeys(titles)),
        draw,
        "change of the loss",
        across=2,
        height=rows_height(len(layers), 20, 60),
        axes={"y": rows_axis(layers)},
    )


def dose(table: pd.DataFrame) -> Any:
    """Mean damage of the draws against the share of supernodes, one line per layer."""
    means = table.groupby(["layer", "hit_rate"], sort=False, as_index=False)["damage"].mean()
    x, y = ({"title": {"text": title}} for title in ("share of supernodes", "change of the loss"))
    return figure_of(lines_of(means, "hit_rate", "damage", "layer"), xaxis=x, yaxis=y)


_SETS = (
    "Change of the loss when a set of units is removed, and of its random controls: mean, with the 95 % interval of their draws."
)
_DOSE = "Change of the loss against the share of supernodes in sets of as many units, mean over draws."
