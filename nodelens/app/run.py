"""Runs a task from its config, for scripts and notebooks."""

from omegaconf import DictConfig


def run(cfg: DictConfig) -> float:
    """Runs the task that a config names. Returns the accuracy, or the area under the pruning curve."""
    from .tasks import TASKS  # imported late: --help does not need them

    return TASKS[cfg.task](cfg)
