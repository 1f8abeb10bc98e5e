"""The plots of analyses: each kind has a file ``<kind>_figures.py`` with a function ``figures_of``."""

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

from nodelens.results.findings import Findings

from .plot import Plot

TITLES = {"geometry": "Geometry of the residual stream"}  # where it is not the name


def plots_of(found: Any) -> list[Plot]:
    """The plots of what an analysis found; none for a kind without figures."""
    draw = _drawing(kind_of(found))
    return list(draw(found)) if draw is not None else []


def has_figures(found: Any) -> bool:
    """Whether results of this kind of analysis are drawn."""
    return _drawing(kind_of(found)) is not None


def title_of(found: Any, name: str = "") -> str:
    """The title of an analysis: its kind, and the name where it has another one."""
    kind = kind_of(found)
    title = TITLES.get(kind, kind.replace("_", " ").capitalize())
    from nodelens.analysis.registry import list_analyses

    if name in list_analyses():
        return TITLES.get(name, name.replace("_", " ").capitalize())
    return f"{title}: {name}" if name and name != kind else title


def kind_of(found: Any) -> str:
    """The name of an analysis in the registry, by its result."""
    return found.kind if isinstance(found, Findings) else type(found).__name__.removesuffix("Result").lower()


def _drawing(kind: str) -> Callable[[Any], Iterable[Plot]] | None:
    if not kind.isidentifier() or importlib.util.find_spec(f"nodelens.report.{kind}_figures") is None:
        return None
    module = importlib.import_module(f"nodelens.report.{kind}_figures")
    return getattr(module, "figures_of", None)
