"""Rows that were left out because they are not finite: how many of how many, and a warning where they are many."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SHARE = 0.01  # of the rows of a site; a larger share is a warning


def left_out_rows(sites: Iterable[str], left_out: Sequence[int], seen: Sequence[int]) -> list[dict[str, Any]]:
    """One entry per site that left rows out: ``site``, ``rows`` left out, and ``of``, all rows that were seen there."""
    every = zip(sites, left_out, seen, strict=True)
    return [{"site": site, "rows": rows, "of": total} for site, rows, total in every if rows]


def many_left_out(entries: Sequence[Mapping[str, Any]]) -> str:
    """A line about the site that left out the largest share of its rows, if that is above 1 %; otherwise empty."""
    many = [entry for entry in entries if entry["rows"] > SHARE * entry.get("of", float("inf"))]
    if not many:
        return ""
    worst = max(many, key=lambda entry: entry["rows"] / entry["of"])
    sites = f"{len(many) - 1} other site{'s' * (len(many) > 2)}"
    others = f", and more than {SHARE:.0%} at {sites}" if len(many) > 1 else ""
    return (
        f"{worst['rows']:,} of {worst['of']:,} rows ({worst['rows'] / worst['of']:.0%}) at {worst['site']} are not finite and were "
        f"left out{others}: the values describe the other rows only. Look for NaN or infinity in the inputs, for an overflow, and "
        "for padded tokens without a mask"
    )


def warn_of_rows(entries: Sequence[Mapping[str, Any]]) -> None:
    """Warns, with a UserWarning, where more than 1 % of the rows of a site were left out."""
    line = many_left_out(entries)
    if line:
        warnings.warn(line, stacklevel=3)
