"""The geometry of a language model as an analysis."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nodelens.analysis.geometry.analyze_model import GeometryOptions, measure_geometry
from nodelens.analysis.geometry.bundle import GeometryResult

from .base import Analysis, AnalysisCall, Progress


@dataclass(frozen=True)
class GeometryAnalysis(Analysis, GeometryOptions):
    """The geometry of a language model's residual stream, as a config composes it; the fields are those of ``GeometryOptions``."""

    def run(self, model: nn.Module, data: Iterable[Any], call: AnalysisCall) -> GeometryResult:
        options = {name: _plain(value) for name, value in vars(self).items()}
        return measure_geometry(model, _Shown(data, call.progress), GeometryOptions(**options), saved=call.saved)


@dataclass(frozen=True)
class _Shown:
    """Data under a progress bar. They can be read as often as the data themselves."""

    data: Iterable[Any]
    progress: Progress

    def __iter__(self) -> Iterator[Any]:
        return iter(self.progress(self.data))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
