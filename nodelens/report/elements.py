"""The parts of a page in HTML: sections, cards, tables, the command of a run."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

ROWS = 300  # of a table in the page


def section(title: str, parts: Iterable[str], lead: str = "") -> list[str]:
    """A heading and what stands below it; nothing where that is nothing."""
    inner = [part for part in parts if part]
    anchor = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    words = f"<p class='soft'>{html.escape(lead)}</p>" if lead else ""
    return (
        [f"<section id='{anchor}'><h2>{html.escape(title)}</h2>{words}<div class='plots'>", *inner, "</div></section>"]
        if inner
        else []
    )


def contents(parts: Sequence[str]) -> str:
    """Links to the sections of a page."""
    found = re.findall(r"<section id='([^']*)'><h2>(.*?)</h2>", "".join(parts))
    links = "".join(f"<a href='#{anchor}'>{title}</a>" for anchor, title in found)
    return f"<nav aria-label='sections'>{links}</nav>"


def cards(values: Mapping[str, Any]) -> str:
    """Headlines: {what: value}."""
    inner = "".join(f"<div class='card'><b>{html.escape(str(v))}</b><span>{html.escape(k)}</span></div>" for k, v in values.items())
    return f"<div class='cards'>{inner}</div>"


def table(frame: pd.DataFrame, words: bool = False, titles: Mapping[str, str] | None = None) -> str:
    """A table that is sorted by its headings. words: cells hold text that may wrap; titles: what columns mean."""
    known, names = titles or {}, [frame.index.name or "", *frame.columns]
    kind = " class='words'" if words else ""
    head = "".join(f"<th{kind} title='{html.escape(known.get(str(c), ''))}'>{html.escape(str(c))}</th>" for c in names)
    shown = frame.head(ROWS)
    body = "".join(
        f"<tr><td>{html.escape(str(i))}</td>" + "".join(f"<td{kind}>{cell(v)}</td>" for v in row) + "</tr>"
        for i, row in zip(shown.index, shown.itertuples(index=False), strict=True)
    )
    more = f"<p class='soft'>The first {ROWS} of {len(frame):,} rows.</p>" if len(frame) > ROWS else ""
    rows = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f"<div>{more}<div class='wide' tabindex='0'><table class='sortable'>{rows}</table></div></div>"


def cell(value: Any) -> str:
    """A value as the text of a cell."""
    if isinstance(value, float):
        return "NaN" if value != value else f"{value:.4g}"
    return html.escape(str(value))


def command(words: str, what: str = "The command that made this page") -> str:
    """A command with a button that copies it."""
    text = html.escape(words)
    return f"<div><h3>{html.escape(what)} <button type='button' data-copy='{text}'>copy</button></h3><pre>{text}</pre></div>"
