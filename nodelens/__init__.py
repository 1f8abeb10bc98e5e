"""Measure the units of a neural network, find out which of them matter, remove those that do not."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nodelens.analysis.geometry.analyze_model import analyze_model
    from nodelens.analysis.geometry.bundle import GeometryResult
    from nodelens.app.config import load_config
    from nodelens.app.run import run
    from nodelens.data.selectors import select_tokens
    from nodelens.engine.analyze import analyze
    from nodelens.interventions.wrapper import ModelWrapper
    from nodelens.network.find_layers import find_layers
    from nodelens.pruning.prune import prune
    from nodelens.pruning.strategies import PruningConfig, get_pruning_strategy, list_pruning_strategies
    from nodelens.pruning.surgery.save import load_pruned
    from nodelens.results.result import Result, load, load_runs
    from nodelens.training.finetune import Finetune

    from .metrics import get_metric, list_metrics, register_metric

_HOMES = {
    "analyze": "engine.analyze",
    "analyze_model": "analysis.geometry.analyze_model",
    "GeometryResult": "analysis.geometry.bundle",
    "find_layers": "network.find_layers",
    "select_tokens": "data.selectors",
    "get_metric": "metrics",
    "list_metrics": "metrics",
    "register_metric": "metrics",
    "Result": "results.result",
    "load": "results.result",
    "load_runs": "results.result",
    "load_config": "app.config",
    "run": "app.run",
    "ModelWrapper": "interventions.wrapper",
    "Finetune": "training.finetune",
    "prune": "pruning.prune",
    "load_pruned": "pruning.surgery.save",
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
