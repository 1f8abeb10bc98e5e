"""Analyses as a config composes them. Options are fields; a call measures and returns a result that can be saved and summarised."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pandas as pd
from torch import nn

from nodelens.analysis.geometry.analyze_model import GeometryOptions, measure_geometry
from nodelens.analysis.geometry.bundle import GeometryResult

Progress = Callable[[Iterable[Any]], Iterable[Any]]


class AnalysisResult(Protocol):
    """The result of an analysis."""

    def save(self, folder: Any) -> Any:
        """Writes the result to a folder, ``metadata.json`` last."""
        ...

    def summary(self) -> str:
        """The main findings, one line each, for a terminal."""
        ...

    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables of the result by name, for a logger that accepts tables."""
        ...


class Analysis(Protocol):
    """The call that analyze.py makes for each member of the group ``analysis``. Data and evaluation can be read several times."""

    def __call__(
        self, model: nn.Module, data: Iterable[Any], *, evaluation: Iterable[Any] | None, seed: int, progress: Progress
    ) -> AnalysisResult: ...


@dataclass(frozen=True)
class GeometryAnalysis(GeometryOptions):
    """The geometry of a language model's residual stream, as a config composes it; the fields are those of ``GeometryOptions``."""

    def __call__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        *,
        evaluation: Iterable[Any] | None = None,
        seed: int = 0,
        progress: Progress = iter,
    ) -> GeometryResult:
        options = {name: _plain(value) for name, value in vars(self).items()}
        return measure_geometry(model, _Shown(data, progress), GeometryOptions(**options))


@dataclass(frozen=True)
class _Shown:
    """Data under a progress bar. They can be read as often as the data themselves."""

    data: Iterable[Any]
    progress: Progress

    def __iter__(self) -> Iterator[Any]:
        return iter(self.progress(self.data))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
