"""What analyses have in common: the arguments of a call as one value, and what is the same for all of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from torch import nn

from nodelens.engine.identity import identity, identity_of_result
from nodelens.engine.saved_work import SavedWork
from nodelens.messages import as_seed, check_names
from nodelens.metrics import Metric
from nodelens.network.eval_mode import one_at_a_time, uncompiled
from nodelens.network.sharded import check_whole
from nodelens.results.result import Result

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


@dataclass(frozen=True, eq=False)
class AnalysisCall:
    """What an analysis is given besides the model and the data.

    analysis:   its class name, for messages
    evaluation: batches on which losses are measured; they can be read again
    result:     of the pass over the data, where there was one
    seed:       of everything that is drawn
    progress:   wraps the batches of each pass, for a progress bar
    objective:  task, output and loss, where they are given; see ``AnalyzeOptions``
    saved:      where work that is done is kept, so that an analysis that was stopped continues; see ``SavedWork``
    """

    analysis: str
    evaluation: Iterable[Any]
    result: Result | None = None
    seed: int = 0
    progress: Progress = iter
    objective: dict[str, Any] = field(default_factory=dict)
    saved: SavedWork | None = None

    @property
    def measured(self) -> Result:
        """The result of the pass. Raises ValueError where there was none."""
        if self.result is None:
            raise ValueError(
                f"{self.analysis} reads what a run has measured: run it by nl.analyze(model, data, metrics, analysis=...), or give "
                "result="
            )
        return self.result


class Analysis:
    """An analysis: its options are fields, and a call returns a result that can be saved and summarised.

    A subclass defines ``run``. ``nl.analyze(analysis=...)`` also takes any other object with ``required_metrics`` and a call of the
    same arguments.
    """

    def required_metrics(self) -> dict[str, Metric]:
        """The metrics that the pass over the data has to measure for it, by column; by default none."""
        return {}

    def run(self, model: nn.Module, data: Iterable[Any], call: AnalysisCall) -> Any:
        """The analysis itself: an ``AnalysisResult``."""
        raise NotImplementedError

    @one_at_a_time
    def __call__(
        self,
        model: nn.Module,
        data: Iterable[Any] = (),
        *,
        result: Result | None = None,
        evaluation: Iterable[Any] | None = None,
        seed: int = 0,
        progress: Progress = iter,
        save_to: str | Path | None = None,
        save_minutes: float = 10.0,
        **objective: Any,
    ) -> Any:
        """Runs the analysis; see its class for what it returns and raises.

        data, evaluation: batches that can be read again; evaluation: those on which losses are measured, by default data.
        result: of a pass over the data, for analyses of measured units. save_to: folder for what is done, from which the same call
        continues; save_minutes: how often sums are saved. objective: task, output and loss, as in ``nl.analyze``.
        """
        name, model, own = type(self).__name__, uncompiled(model), data if evaluation is None else evaluation
        seed = as_seed(seed)
        if model is not None:  # analyses of a table of units need none
            check_whole(name, model)
        check_names(name, objective, ("task", "output", "loss"))
        about = () if save_to is None else (name, identity(vars(self)), seed, identity(objective), identity_of_result(result))
        saved = SavedWork.of(save_to, save_minutes, model, *about)
        return self.run(model, data, AnalysisCall(name, own, result, seed, progress, objective, saved))
