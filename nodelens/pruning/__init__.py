"""Removing units: what is coupled, what scores it, which units go, and what is left.

Names load on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .strategies import PruningConfig, PruningStrategy, get_pruning_strategy, list_pruning_strategies

__all__ = ["PruningConfig", "PruningStrategy", "get_pruning_strategy", "list_pruning_strategies"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.strategies"), name)


def __dir__() -> list[str]:
    return __all__
