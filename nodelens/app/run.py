"""Runs a task from its config, for scripts and notebooks."""

from omegaconf import DictConfig

from nodelens.messages import config_words


def run(cfg: DictConfig) -> float:
    """Runs the task that a config names. Returns the accuracy, or the area under the pruning curve."""
    from .tasks import TASKS  # imported late: --help does not need them

    with config_words():
        return TASKS[cfg.task](cfg)
