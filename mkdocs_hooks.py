"""Hooks of the documentation site."""

from typing import Any

from nodelens.metrics.catalogue import catalogue


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The catalogue as the classes have it now, in place of the file's text, which ``python -m nodelens.metrics`` wrote."""
    return catalogue() if page.file.src_uri == "metrics.md" else markdown
