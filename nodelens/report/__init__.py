"""Figures and report pages, made from the saved files only."""

from .page import write_figures, write_page
from .pruning_page import write_pruning_page
from .training_page import write_training_page

__all__ = ["write_figures", "write_page", "write_pruning_page", "write_training_page"]
