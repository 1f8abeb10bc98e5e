"""Measure the units of a neural network, find out which of them matter, remove those that do not."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .analysis.bundle import GeometryResult
    from .analysis.geometry import analyze_model
    from .config import load_config, run
    from .data.selectors import select_tokens
    from .finetune import Finetune
    from .layers import find_layers
    from .measure import analyze
    from .metrics import get_metric, list_metrics, register_metric
    from .pruning.artefact import load_pruned
    from .pruning.prune import prune
    from .pruning.strategies import PruningConfig, get_pruning_strategy, list_pruning_strategies
    from .results import Result, load, load_runs
    from .wrapper import ModelWrapper

_HOMES = {
    "analyze": "measure",
    "analyze_model": "analysis.geometry",
    "GeometryResult": "analysis.bundle",
    "find_layers": "layers",
    "select_tokens": "data.selectors",
    "get_metric": "metrics",
    "list_metrics": "metrics",
    "register_metric": "metrics",
    "Result": "results",
    "load": "results",
    "load_runs": "results",
    "load_config": "config",
    "run": "config",
    "ModelWrapper": "wrapper",
    "Finetune": "finetune",
    "prune": "pruning.prune",
    "load_pruned": "pruning.artefact",
    "PruningConfig": "pruning.strategies",
    "get_pruning_strategy": "pruning.strategies",
    "list_pruning_strategies": "pruning.strategies",
}

__all__ = [
    "Finetune",
    "GeometryResult",
    "ModelWrapper",
    "PruningConfig",
    "Result",
    "analyze",
    "analyze_model",
    "find_layers",
    "get_metric",
    "get_pruning_strategy",
    "list_metrics",
    "list_pruning_strategies",
    "load",
    "load_config",
    "load_pruned",
    "load_runs",
    "prune",
    "register_metric",
    "run",
    "select_tokens",
]


def __getattr__(name: str) -> Any:
    """Names are imported when they are first used: ``import nodelens`` itself takes no time."""
    if name not in _HOMES:
        raise AttributeError(f"module 'nodelens' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
