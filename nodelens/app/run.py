"""Runs a task from its config, for scripts and notebooks."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig

from nodelens.messages import config_words


def run(cfg: DictConfig) -> float:
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
