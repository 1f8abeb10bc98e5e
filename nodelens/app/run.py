"""Runs a task from its config, for scripts and notebooks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig

from nodelens.messages import config_words, kind_of

if TYPE_CHECKING:
    from nodelens.results.result import Result


class Run(NamedTuple):
    """A run that has ended.

    result: what is in its folder, as ``nl.load`` reads it: units for analyze, scores for prune, units of the last epoch that was
            measured for train; None for a dry run
    folder: where everything is that it wrote, such as the checkpoints of train and the table ``sweep.parquet`` of prune
    score:  the accuracy of train and analyze, the area under the best curve of prune
    """

    result: Result | None
    folder: Path
    score: float


def run(cfg: DictConfig) -> Run:
    """Runs the task that a config names, and returns its result and its folder."""
    from nodelens.analysis.load import load

    if not isinstance(cfg, DictConfig):
        raise TypeError(f"nl.run takes the config of a task, as nl.load_config('analyze', ['model=mlp']), not {kind_of(cfg)}")
    score, folder = run_task(cfg), Path(cfg.paths.output_dir)
    finished = any((folder / name).is_file() for name in ("metadata.json", "result.json"))
    return Run(load(folder) if finished else None, folder, score)


def run_task(cfg: DictConfig) -> float:
    """Runs the task that a config names. Returns the accuracy, or the area under the pruning curve."""
    from .tasks import TASKS  # imported late: --help does not need them

    with config_words(), _logged_warnings():
        return TASKS[cfg.task](cfg)


@contextmanager
def _logged_warnings() -> Iterator[None]:
    """Within it, warnings go to the log of the run too."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *more: Any) -> None:
        logging.getLogger("nodelens").warning("%s: %s (%s:%d)", category.__name__, message, filename, lineno)
        shown(message, category, filename, lineno, *more)

    warnings.showwarning = show  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning = shown
