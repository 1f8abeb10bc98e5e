"""What the columns of a result are: meaning, unit, options, source; and which values are missing, and why."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from nodelens.metrics import get_metric
from nodelens.metrics.base import section_of
from nodelens.results.result import Result

from .elements import table

_UNITS = ("nats per index", "nats", "directions", "rows", "outputs")
_PLACES = 4  # layers that a line about missing values names


def definitions_of(result: Result) -> dict[str, str]:
    """{column: what it is}: the first words of the metric's description, its unit, options and source."""
    return {column: _definition(about) for column, about in (result.metadata.get("metrics") or {}).items()}


def _definition(about: Mapping[str, Any]) -> str:
    words = [
        meaning(about),
        f"Unit: {unit}." if (unit := _described(about, "Unit")) else "",
        f"Options: {options}." if (options := _options(about)) else "",
        f"Source: {source}." if (source := about.get("source", "")) else "",
    ]
    return " ".join(word for word in words if word)


def meaning(about: Mapping[str, Any]) -> str:
    """The first words of a metric's description; empty for a metric of one's own, or one with required options."""
    return " ".join(re.split(r"\n\s*\n|\n\s*\w+:", _description(about))[0].split()).replace("``", "")


def label(result: Result, column: str) -> str:
    """A column with its unit, as the name of an axis: ``synergy (nats)``. Only units that no option changes are named."""
    about = (result.metadata.get("metrics") or {}).get(column) or {}
    shared = any(value is True and "normal" in name for name, value in (about.get("options") or {}).items())
    unit = next((unit for unit in _UNITS if re.match(rf"{unit}\b", _described(about, "Unit"))), "")
    return f"{column} ({unit})" if unit and not shared else column


def _options(about: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in about["options"].items())


def _described(about: Mapping[str, Any], section: str) -> str:
    return section_of(_description(about), section).replace("``", "").rstrip(".")


def _description(about: Mapping[str, Any]) -> str:
    try:
        return type(get_metric(about["metric"])).__doc__ or ""
    except (KeyError, ValueError, TypeError):
        return ""


def definitions(result: Result) -> str:
    """A table of the columns: meaning, unit, options, what it reads, source."""
    rows = {
        column if m["metric"] == column else f"{column}: {m['metric']}": {
            "meaning": meaning(m),
            "unit": _described(m, "Unit"),
            "options": _options(m) or "none",
            "reads": (", ".join(m["needs"].values()) or "weights") + _without_activation(m),
            "source": m.get("source", ""),
        }
        for column, m in result.metadata["metrics"].items()
    }
    return table(pd.DataFrame(rows).T.rename_axis("column"), words=True)


def _without_activation(metric: dict[str, Any]) -> str:
    """At which layers a metric that reads behind the activation read the layer's own output."""
    layers = [layer for layer, behind in metric.get("read_behind", {}).items() if not behind]
    return f"; no activation follows {_listed(layers)}: read at the output" if layers else ""


def missing(result: Result) -> str:
    """Which values are missing, and why: one row per column and reason."""
    entries = result.metadata.get("missing", [])
    if not entries:
        return "<p>None: every unit and layer has a value for every metric.</p>"
    return table(pd.DataFrame(_gaps(pd.DataFrame(entries))).set_index("column"), words=True)


def _gaps(entries: pd.DataFrame) -> Iterator[dict[str, Any]]:
    counted = entries.assign(count=entries["count"].fillna(1) if "count" in entries else 1)
    for (column, reason), rows in counted.groupby(["column", "reason"], sort=False):
        yield {
            "column": column,
            "values missing": f"{int(rows['count'].sum()):,}",
            "reason": reason,
            "at": _listed(list(rows["layer"])),
        }


def _listed(layers: list[str]) -> str:
    more = f" and {len(layers) - _PLACES:,} more" if len(layers) > _PLACES else ""
    return ", ".join(map(str, layers[:_PLACES])) + more
