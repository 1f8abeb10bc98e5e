"""Analyses after each epoch of a training, and what they say about all epochs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from nodelens.analysis.analyze import add_analysis, kept_in
from nodelens.analysis.base import Analysis, AnalysisResult
from nodelens.analysis.registry import Analyses, as_analyses, load_analysis
from nodelens.results.result import Result


@dataclass
class EpochAnalyses:
    """The analyses of a training.

    After each epoch, what one finds is in ``<folder>/<name>/<epoch>``; ``<folder>/<name>`` has what an analysis with a method
    ``over_epochs`` says about all of them.
    """

    analyses: dict[str, Analysis]
    found: dict[str, AnalysisResult] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Analyses) -> "EpochAnalyses":
        """From names and analysis objects. Raises ValueError for an unknown name."""
        return cls(as_analyses(given))

    def run(
        self,
        model: nn.Module,
        data: Iterable[Any],
        result: Result,
        seed: int,
        save_to: Path | None = None,
        save_minutes: float = 10.0,
    ) -> None:
        """Analyses the result of an epoch, and adds columns and matrices to it. Every process must call it.

        save_to: a folder for what is done, in case an analysis is stopped; save_minutes: how often sums are saved there.
        """
        self.found = {}
        for name, analysis in self.analyses.items():
            options: dict[str, Any] = {"evaluation": None, "progress": iter} | kept_in(analysis, save_to, name, save_minutes)
            self.found[name] = analysis(model, data, result=result, seed=seed, **options)
            add_analysis(result, name, self.found[name])

    def write(self, folder: Path, epoch: int) -> None:
        """Writes what was found after an epoch."""
        for name, found in self.found.items():
            found.save(folder / name / f"{epoch:03d}")

    def finish(self, folder: Path) -> None:
        """Writes what analyses say about all epochs of a folder, also those before a training was resumed."""
        for name, analysis in self.analyses.items():
            every = {int(place.name): load_analysis(place) for place in _epochs(folder / name)}
            if hasattr(analysis, "over_epochs") and every:
                analysis.over_epochs(every).save(folder / name)


def _epochs(folder: Path) -> Iterator[Path]:
    """The folders of finished epochs, in order."""
    for place in sorted(folder.glob("*")):
        if place.name.isdecimal() and (place / "metadata.json").is_file():
            yield place
