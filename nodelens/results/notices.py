"""What a reader of a result has to know beside its numbers: rows left out, repeated samples, metrics biased by few rows."""

from collections.abc import Mapping
from typing import Any

from .left_out import many_left_out


def notices(metadata: Mapping[str, Any]) -> list[str]:
    """One line each: rows that are not finite, the pass's own warnings, and metrics with too few rows at some places."""
    lines = [many_left_out(metadata.get("left_out") or []), *(metadata.get("warnings") or []), few_rows(metadata)]
    return [line for line in lines if line]


def few_rows(metadata: Mapping[str, Any]) -> str:
    """A line about the metrics that few rows bias, with the number of places; empty if there are none."""
    places: dict[str, int] = {}
    for entry in metadata.get("counts") or []:
        if entry["rule"] == "few_rows":
            places[entry["metric"]] = places.get(entry["metric"], 0) + 1
    listed = ", ".join(f"{metric} at {count} place{'s' * (count > 1)}" for metric, count in sorted(places.items()))
    return f"few rows for the number of units bias {listed}: measure more samples" if listed else ""
