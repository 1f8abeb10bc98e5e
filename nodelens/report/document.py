"""A page in the making: its parts, the data in it and beside it, and the script that draws."""

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nodelens.results.files import write_text

from .plot import FORMATS, Plot

ASSETS = Path(__file__).parent / "assets"
WAYS = ("shared", "inline", "cdn")
SCRIPT = "plotly.min.js"
_SCRIPTS = ("data.js", "page.js", "units.js", "runs.js", "cells.js", "epochs.js")
_INSIDE = 300_000  # characters of one piece of data that a page holds; larger ones become a file beside it
_WHOLE = 5_000_000  # characters of all data that a page holds
_INTEGERS = 2**31


class Document:
    """A page and the files that belong to it.

    file: of the page. plotly: ``shared``, the script is a file beside the page; ``inline``, it is in the page; ``cdn``, it is read
    from the network. Large data become files in ``<page>_files/``, which the page reads when they are shown. That works without a
    server, because they are scripts. formats: in which the figures are written to ``figures/`` as well.

    Raises ValueError for another way or format.
    """

    def __init__(self, file: Path, plotly: str = "shared", formats: Sequence[str] = ()):
        check_options(plotly, formats)
        self.file, self.plotly, self.formats = file, plotly, formats
        self.side = file.with_name(f"{file.stem}_files")
        self.inside: dict[str, str] = {}
        self.beside: dict[str, str] = {}

    def embed(self, key: str, value: Any, on_demand: bool = False) -> None:
        """Adds data under a key: in the page, or in a file beside it if they are large or wanted on demand."""
        words = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
        words = words.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
        whole = sum(map(len, self.inside.values())) + len(words)
        (self.beside if on_demand or len(words) > _INSIDE or whole > _WHOLE else self.inside)[key] = words

    def plot(self, plot: Plot) -> str:
        """A figure with title, caption, and its data as a table and as CSV."""
        if self.formats:
            from .paper import write_plots

            write_plots([plot], self.file.parent / "figures", self.formats)
        key = f"plot-{len(self.inside) + len(self.beside)}"
        self.embed(key, plot.figure.to_json())
        if len(plot.table):
            self.embed(f"{key}-table", block(plot.table))
        title, caption, name = (html.escape(str(each)) for each in (plot.title, plot.caption, plot.name))
        height = int(plot.figure.layout.height or 380)
        return (
            f"<figure class='plot' data-plot='{key}' data-name='{name}'{' data-table' if len(plot.table) else ''}>"
            f"<h3>{title}</h3><figcaption>{caption}</figcaption><div class='menus'></div>"
            "<div class='scroll'>"
            f"<div class='canvas' style='min-height:{height}px' role='img' tabindex='0' aria-label='{title}. {caption}'></div>"
            "</div><div class='tools'></div></figure>"
        )

    def table(self, frame: pd.DataFrame, name: str, titles: Mapping[str, str] | None = None) -> str:
        """A table of any length that is sorted, filtered and saved as CSV."""
        key = f"table-{len(self.inside) + len(self.beside)}"
        self.embed(key, {"titles": dict(titles or {}), "table": block(frame)})
        return f"<div data-widget='table' data-key='{key}' data-name='{html.escape(name)}'></div>"

    def write(self, parts: Iterable[str], title: str = "nodelens") -> Path:
        """Writes the page, the data beside it and, where it is shared, the script; returns the path of the page."""
        body = "".join(parts)
        embedded = "".join(f"<script type='application/json' id='data-{k}'>{words}</script>" for k, words in self.inside.items())
        page = (
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
            "<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<title>{html.escape(title)}</title><style>{_asset('page.css')}</style></head>"
            f"<body data-side='{html.escape(self.side.name)}'><noscript><p class='warning'>The figures of this page need "
            f"JavaScript.</p></noscript>{body}{embedded}{self._script()}"
            f"<script>{''.join(map(_asset, _SCRIPTS))}</script></body></html>"
        )
        for key, words in self.beside.items():
            write_text(self.side / f"{key}.js", f"nodelens.put({json.dumps(key)},{words});")
        write_text(self.file, page)
        for old in self.side.glob("*.js") if self.side.is_dir() else ():  # the page before this one read them
            if old.stem not in self.beside:
                old.unlink()
        return self.file

    def _script(self) -> str:
        from plotly.offline import get_plotlyjs, get_plotlyjs_version

        if self.plotly == "inline":
            return f"<script>{get_plotlyjs()}</script>"
        if self.plotly == "cdn":
            known = base64.b64encode(hashlib.sha384(get_plotlyjs().encode()).digest()).decode()
            source = f"https://cdn.plot.ly/plotly-{get_plotlyjs_version()}.min.js"
            return f"<script src='{source}' integrity='sha384-{known}' crossorigin='anonymous'></script>"
        beside, script = self.file.with_name(SCRIPT), get_plotlyjs()
        if not beside.is_file() or beside.stat().st_size != len(script.encode()):
            write_text(beside, script)
        return f"<script src='{SCRIPT}'></script>"


def check_options(plotly: str, figures: Sequence[str] = ()) -> None:
    """Raises ValueError for an unknown place of the script and an unknown format of figures."""
    if plotly not in WAYS:
        raise ValueError(f"report.plotly is {plotly!r}; it must be {', '.join(WAYS[:-1])} or {WAYS[-1]}")
    if isinstance(figures, str) or (unknown := [each for each in figures if each not in FORMATS]):
        kinds, found = f"{', '.join(FORMATS[:-1])} and {FORMATS[-1]}", figures if isinstance(figures, str) else unknown[0]
        raise ValueError(f"report.figures has {found!r}; it must be a list of {kinds}, such as [{FORMATS[-1]}]")


def block(frame: pd.DataFrame) -> dict[str, Any]:
    """A table as compact JSON: numbers as base64 of little-endian arrays, words as categories with codes.

    Floats are kept to 7 digits (float32) where its range suffices.
    """
    named = [name for name in frame.index.names if name is not None]
    flat = frame.reset_index() if named else frame
    return {"rows": len(flat), "columns": [{"name": str(c), **_packed(flat[c])} for c in flat]}


def _packed(column: pd.Series) -> dict[str, Any]:
    if pd.api.types.is_float_dtype(column):
        return _array(_floats(column.to_numpy(float, na_value=np.nan)))
    if pd.api.types.is_bool_dtype(column) or not pd.api.types.is_numeric_dtype(column):
        codes, words = pd.factorize(column.astype("object"))
        return {"words": [str(word) for word in words], **_array(codes.astype("<i4"))}
    if column.isna().any() or (len(column) and column.abs().max() >= _INTEGERS):
        return _array(column.to_numpy(float, na_value=np.nan).astype("<f8"))
    return _array(column.to_numpy().astype("<i4"))


def _floats(values: np.ndarray) -> np.ndarray:
    """float32 where no value leaves its range."""
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    fits = not len(sizes) or (sizes.min() > 1e-37 and sizes.max() < 1e38)
    return values.astype("<f4" if fits else "<f8")


def _array(values: np.ndarray) -> dict[str, str]:
    return {"kind": values.dtype.str[1:], "data": base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()}


@cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")
