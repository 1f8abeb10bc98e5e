"""A task from its config: what a script runs, and a notebook too."""

from omegaconf import DictConfig


def run(cfg: DictConfig) -> float:
    """What the script of a config's task does; returns its number: accuracy, or the area under a pruning curve."""
    from .tasks import TASKS  # the command line shows its help without them

    return TASKS[cfg.task](cfg)
