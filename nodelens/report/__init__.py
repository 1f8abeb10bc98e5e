"""Figures and one page, made of the saved files only."""

from .page import write_page

__all__ = ["write_page"]
