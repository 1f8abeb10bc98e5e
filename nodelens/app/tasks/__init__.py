"""The tasks of the three scripts, as functions of a config."""

from .analyze import analyze
from .prune import prune
from .train import train

TASKS = {"train": train, "analyze": analyze, "prune": prune}

__all__ = ["TASKS", "analyze", "prune", "train"]
