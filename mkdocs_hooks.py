"""Hooks of the documentation site."""

import re
from typing import Any

import griffe

from nodelens.metrics.catalogue import catalogue

_ENTRY = re.compile(r"^(\w+(?:, \w+)*): +(?=\S)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The catalogue as the classes have it now, in place of the file's text, which ``python -m nodelens.metrics`` wrote."""
    return catalogue() if page.file.src_uri == "metrics.md" else markdown


class OptionLists(griffe.Extension):
    """Shows a docstring's aligned ``name: text`` lines as a list."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring of every object that is read."""
        if obj.docstring is not None:
            obj.docstring.value = "\n\n".join(map(_as_list, obj.docstring.value.split("\n\n")))


def _as_list(paragraph: str) -> str:
    lines = paragraph.splitlines()
    entries = [line for line in lines if _ENTRY.match(line)]
    if len(entries) < 2 or not all(_ENTRY.match(line) or line.startswith("  ") for line in lines):
        return paragraph
    return "\n".join(_ENTRY.sub(r"- `\1`: ", line) for line in lines)
