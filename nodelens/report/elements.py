"""The parts of a page: sections, figures, tables, and the file itself."""

import base64
import html
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from nodelens.results.files import write

_STYLE = """
:root { --ink: #1c1f24; --soft: #5c6470; --line: #dfe3e8; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p.lead { color: var(--soft); margin-top: 0; } figure { margin: 1rem 0; } img { max-width: 100%; }
p.warning { border-left: 4px solid #c0392b; padding-left: .6rem; }
figcaption { color: var(--soft); font-size: .9rem; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.words { white-space: normal; text-align: left; }
"""


def write_html(file: Path, parts: Iterable[str]) -> Path:
    """Writes a page of HTML parts."""
    head = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>nodelens</title><style>{_STYLE}</style>"
    page = f"{head}{''.join(parts)}</html>"
    write(file, lambda path: path.write_text(page, encoding="utf-8"))
    return file


def section(title: str, parts: Iterable[str]) -> list[str]:
    """A heading and what stands below it."""
    return [f"<h2>{html.escape(title)}</h2>", *parts]


def figure_file(folder: Path, name: str) -> Path:
    """The file of a figure. Names come from layers, which may have any characters: those of paths become underscores."""
    return folder / "figures" / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.png"


def figure(folder: Path, name: str, png: bytes, caption: str) -> str:
    """A picture in the page, with its caption; the picture is written to ``figures/`` as well."""
    write(figure_file(folder, name), lambda path: path.write_bytes(png))
    encoded = base64.b64encode(png).decode()
    text = html.escape(caption)
    return f"<figure><img alt='{text}' src='data:image/png;base64,{encoded}'><figcaption>{text}</figcaption></figure>"


def table(frame: pd.DataFrame, words: bool = False) -> str:
    """A table. words: cells hold text that may wrap."""
    head = "".join(f"<th>{html.escape(str(c))}</th>" for c in [frame.index.name or "", *frame.columns])
    kind = " class='words'" if words else ""
    body = "".join(
        f"<tr><td>{html.escape(str(i))}</td>" + "".join(f"<td{kind}>{cell(v)}</td>" for v in row) + "</tr>"
        for i, row in zip(frame.index, frame.itertuples(index=False), strict=True)
    )
    return f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>"


def cell(value: Any) -> str:
    """A value as the text of a cell."""
    if isinstance(value, float):
        return "NaN" if value != value else f"{value:.4g}"
    return html.escape(str(value))
