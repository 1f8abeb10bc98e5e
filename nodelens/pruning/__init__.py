"""Removing units: what scores them, which go, and what is left."""

from .criteria import random_scores, scores
from .mask import gates, masked
from .removal import RemovalPlan, remove
from .sweep import Cell, cells, run_sweep, table_of

__all__ = ["Cell", "RemovalPlan", "cells", "gates", "masked", "random_scores", "remove", "run_sweep", "scores", "table_of"]
