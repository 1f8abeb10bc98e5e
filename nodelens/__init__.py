"""Measure the units of a neural network, find out which of them matter, remove those that do not."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nodelens.analysis.geometry.analyze_model import GeometryOptions
    from nodelens.analysis.geometry.bundle import GeometryResult, load_bundle
    from nodelens.analysis.supernodes.supernodes import Supernodes
    from nodelens.app.config import load_config
    from nodelens.app.cost_estimate import Machine, estimate_cost
    from nodelens.app.run import run
    from nodelens.compat.representation_geometry import analyze_model
    from nodelens.data.selectors import select_tokens
    from nodelens.engine.analyze import analyze
    from nodelens.engine.options import AnalyzeOptions
    from nodelens.evaluation.evaluate import evaluate
    from nodelens.interventions.wrapper import ModelWrapper
    from nodelens.metrics import Metric, Need, get_metric, list_metrics, register_metric
    from nodelens.network.find_layers import find_layers
    from nodelens.network.groups import PruningGroup, PruningGroups
    from nodelens.network.layers import Layer
    from nodelens.pruning.allocation.allocate import Allocation
    from nodelens.pruning.criteria.criterion import Criterion
    from nodelens.pruning.groups.find import find_groups
    from nodelens.pruning.planning import PruningOptions, Schedule
    from nodelens.pruning.prune import Pruned, prune
    from nodelens.pruning.strategies import PruningConfig, PruningStrategy, get_pruning_strategy, list_pruning_strategies
    from nodelens.pruning.surgery.save import load_pruned
    from nodelens.results.result import Result, load, load_runs
    from nodelens.training.finetune import Finetune

__path__.append(f"{__path__[0]}/app/first_version")  # where python -m nodelens.cli still is
_HOMES = {  # where each name is defined
    "Allocation": "pruning.allocation.allocate",
    "AnalyzeOptions": "engine.options",
    "Criterion": "pruning.criteria.criterion",
    "Finetune": "training.finetune",
    "GeometryOptions": "analysis.geometry.analyze_model",
    "GeometryResult": "analysis.geometry.bundle",
    "Layer": "network.layers",
    "Machine": "app.cost_estimate",
    "Metric": "metrics",
    "ModelWrapper": "interventions.wrapper",
    "Need": "metrics",
    "Pruned": "pruning.prune",
    "PruningConfig": "pruning.strategies",
    "PruningGroup": "network.groups",
    "PruningGroups": "network.groups",
    "PruningOptions": "pruning.planning",
    "PruningStrategy": "pruning.strategies",
    "Result": "results.result",
    "Schedule": "pruning.planning",
    "Supernodes": "analysis.supernodes.supernodes",
    "analyze": "engine.analyze",
    "analyze_model": "compat.representation_geometry",
    "estimate_cost": "app.cost_estimate",
    "evaluate": "evaluation.evaluate",
    "find_groups": "pruning.groups.find",
    "find_layers": "network.find_layers",
    "get_metric": "metrics",
    "get_pruning_strategy": "pruning.strategies",
    "list_metrics": "metrics",
    "list_pruning_strategies": "pruning.strategies",
    "load": "results.result",
    "load_bundle": "analysis.geometry.bundle",
    "load_config": "app.config",
    "load_pruned": "pruning.surgery.save",
    "load_runs": "results.result",
    "prune": "pruning.prune",
    "register_metric": "metrics",
    "run": "app.run",
    "select_tokens": "data.selectors",
}

__all__ = [
    "Allocation",
    "AnalyzeOptions",
    "Criterion",
    "Finetune",
    "GeometryOptions",
    "GeometryResult",
    "Layer",
    "Machine",
    "Metric",
    "ModelWrapper",
    "Need",
    "Pruned",
    "PruningConfig",
    "PruningGroup",
    "PruningGroups",
    "PruningOptions",
    "PruningStrategy",
    "Result",
    "Schedule",
    "Supernodes",
    "analyze",
    "analyze_model",
    "estimate_cost",
    "evaluate",
    "find_groups",
    "find_layers",
    "get_metric",
    "get_pruning_strategy",
    "list_metrics",
    "list_pruning_strategies",
    "load",
    "load_bundle",
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


def __dir__() -> list[str]:
    return __all__
