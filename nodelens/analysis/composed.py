"""The geometry of a language model as an analysis."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nodelens.analysis.geometry.analyze_model import GeometryOptions, measure_geometry
from nodelens.analysis.geometry.bundle import GeometryResult
from nodelens.metrics import Metric
from nodelens.results.result import Result

from .registry import Progress


@dataclass(frozen=True)
class GeometryAnalysis(GeometryOptions):
    """The geometry of a language model's residual stream, as a config composes it; the fields are those of ``GeometryOptions``."""

    def required_metrics(self) -> dict[str, Metric]:
        """None: it measures the residual stream in a pass of its own."""
        return {}

    def __call__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        *,
        result: Result | None = None,
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
