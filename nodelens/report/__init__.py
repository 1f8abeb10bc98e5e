"""Figures and report pages, made from the saved files only."""

from .page import write_figures, write_page, write_pruning_page

__all__ = ["write_figures", "write_page", "write_pruning_page"]
