"""Analyses as a config composes them: options are fields, a call measures, what it returns is saved and says itself in lines."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pandas as pd
from torch import nn

from nodelens.analysis.geometry.analyze_model import GeometryOptions, measure_geometry
from nodelens.analysis.geometry.bundle import GeometryResult

Progress = Callable[[Iterable[Any]], Iterable[Any]]


class Finding(Protocol):
    """What an analysis found."""

    def save(self, folder: Any) -> Any:
        """Writes it, ``metadata.json`` last."""
        ...

    def lines(self) -> list[str]:
        """What it says, for a terminal."""
        ...

    def tables(self) -> dict[str, pd.DataFrame]:
        """What it holds, for a logger that takes tables."""
        ...


class Analysis(Protocol):
    """What analyze.py calls for each member of the group ``analysis``: data and evaluation can be read several times."""

    def __call__(
        self, model: nn.Module, data: Iterable[Any], *, evaluation: Iterable[Any] | None, seed: int, progress: Progress
    ) -> Finding: ...


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
    """Data under a progress bar, that can be read as often as they can."""

    data: Iterable[Any]
    progress: Progress

    def __iter__(self) -> Iterator[Any]:
        return iter(self.progress(self.data))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
