"""Measure the units of a neural network, find out which of them matter, remove those that do not."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nodelens.analysis.ablation.ablate import ablate, ablate_sets
    from nodelens.analysis.analyze import analyze
    from nodelens.analysis.base import Analysis
    from nodelens.analysis.geometry.analyze_model import GeometryOptions
    from nodelens.analysis.geometry.bundle import GeometryResult, load_bundle
    from nodelens.analysis.load import load
    from nodelens.analysis.modularity.compare_modules import compare_modules, match_units
    from nodelens.analysis.modularity.find_modules import Modules, find_modules
    from nodelens.analysis.modularity.graph import modularity
    from nodelens.analysis.modularity.modularity_analysis import ModularityAnalysis
    from nodelens.analysis.registry import get_analysis, list_analyses
    from nodelens.analysis.supernodes.supernodes import Supernodes
    from nodelens.app.config import load_config
    from nodelens.app.cost_estimate import CostEstimate, Machine, estimate_cost
    from nodelens.app.run import Run, run
    from nodelens.compat.representation_geometry import analyze_model
    from nodelens.data.selectors import select_tokens
    from nodelens.engine.options import AnalyzeOptions
    from nodelens.evaluation.evaluate import evaluate
    from nodelens.interventions.edits import Edit, edit
    from nodelens.interventions.lenses.lens import lens
    from nodelens.interventions.patching.patch import patch
    from nodelens.interventions.representation_context import RepresentationContext
    from nodelens.interventions.states import StateConfig, StateManager, StateMap
    from nodelens.interventions.wrapper import ModelWrapper
    from nodelens.metrics import Metric, Need, get_metric, list_metrics, register_metric
    from nodelens.network.find_layers import find_layers
    from nodelens.network.groups import GroupSlice, PruningGroup, PruningGroups
    from nodelens.network.layers import Layer
    from nodelens.pruning.allocation.allocate import Allocation
    from nodelens.pruning.criteria.criterion import Criterion, Term
    from nodelens.pruning.criteria.type_rules import TypeRules
    from nodelens.pruning.groups.find import find_groups
    from nodelens.pruning.planning import PruningOptions, Schedule
    from nodelens.pruning.prune import Pruned, prune
    from nodelens.pruning.removal_plan import RemovalPlan
    from nodelens.pruning.strategies import PruningConfig, PruningStrategy, get_pruning_strategy, list_pruning_strategies
    from nodelens.pruning.surgery.load import load_pruned
    from nodelens.report.paper import export
    from nodelens.report.runs_page import compare
    from nodelens.results.findings import Findings
    from nodelens.results.result import Result
    from nodelens.results.runs import load_runs
    from nodelens.results.trends import score_trends
    from nodelens.statistics import Statistic
    from nodelens.training.finetune import Finetune

__path__.append(f"{__path__[0]}/app/first_version")  # where python -m nodelens.cli still is
_HOMES = {  # where the names are defined
    "analysis.ablation.ablate": "ablate ablate_sets",
    "analysis.analyze": "analyze",
    "analysis.base": "Analysis",
    "analysis.geometry.analyze_model": "GeometryOptions",
    "analysis.geometry.bundle": "GeometryResult load_bundle",
    "analysis.load": "load",
    "analysis.modularity.compare_modules": "compare_modules match_units",
    "analysis.modularity.find_modules": "Modules find_modules",
    "analysis.modularity.graph": "modularity",
    "analysis.modularity.modularity_analysis": "ModularityAnalysis",
    "analysis.registry": "get_analysis list_analyses",
    "analysis.supernodes.supernodes": "Supernodes",
    "app.config": "load_config",
    "app.cost_estimate": "CostEstimate Machine estimate_cost",
    "app.run": "Run run",
    "compat.representation_geometry": "analyze_model",
    "data.selectors": "select_tokens",
    "engine.options": "AnalyzeOptions",
    "evaluation.evaluate": "evaluate",
    "interventions.edits": "Edit edit",
    "interventions.lenses.lens": "lens",
    "interventions.patching.patch": "patch",
    "interventions.representation_context": "RepresentationContext",
    "interventions.states": "StateConfig StateManager StateMap",
    "interventions.wrapper": "ModelWrapper",
    "metrics": "Metric Need get_metric list_metrics register_metric",
    "network.find_layers": "find_layers",
    "network.groups": "GroupSlice PruningGroup PruningGroups",
    "network.layers": "Layer",
    "pruning.allocation.allocate": "Allocation",
    "pruning.criteria.criterion": "Criterion Term",
    "pruning.criteria.type_rules": "TypeRules",
    "pruning.groups.find": "find_groups",
    "pruning.planning": "PruningOptions Schedule",
    "pruning.prune": "Pruned prune",
    "pruning.removal_plan": "RemovalPlan",
    "pruning.strategies": "PruningConfig PruningStrategy get_pruning_strategy list_pruning_strategies",
    "pruning.surgery.load": "load_pruned",
    "report.paper": "export",
    "report.runs_page": "compare",
    "results.findings": "Findings",
    "results.result": "Result",
    "results.runs": "load_runs",
    "results.trends": "score_trends",
    "statistics": "Statistic",
    "training.finetune": "Finetune",
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names.split()}

# fmt: off
__all__ = [
    "Allocation", "Analysis", "AnalyzeOptions", "CostEstimate", "Criterion", "Edit", "Findings", "Finetune",
    "GeometryOptions", "GeometryResult", "GroupSlice", "Layer", "Machine", "Metric", "ModelWrapper",
    "ModularityAnalysis", "Modules", "Need", "Pruned", "PruningConfig", "PruningGroup", "PruningGroups",
    "PruningOptions", "PruningStrategy", "RemovalPlan", "RepresentationContext", "Result", "Run", "Schedule",
    "StateConfig", "StateManager", "StateMap", "Statistic", "Supernodes", "Term", "TypeRules", "ablate",
    "ablate_sets", "analyze", "analyze_model", "compare", "compare_modules", "edit", "estimate_cost", "evaluate",
    "export", "find_groups", "find_layers", "find_modules", "get_analysis", "get_metric", "get_pruning_strategy",
    "lens", "list_analyses", "list_metrics", "list_pruning_strategies", "load", "load_bundle", "load_config",
    "load_pruned", "load_runs", "match_units", "modularity", "patch", "prune", "register_metric", "run",
    "score_trends", "select_tokens",
]
# fmt: on


def __getattr__(name: str) -> Any:
    """Names are imported when they are first used: ``import nodelens`` itself takes no time.

    Each of them refuses keywords that it does not have, and names the nearest one.
    """
    if name == "__version__":
        return import_module(".messages", __name__).version()
    if name not in _MODULES:
        near = "" if name.startswith("_") else import_module(".messages", __name__).nearest(name, __all__)
        raise AttributeError(f"module 'nodelens' has no attribute {name!r}{near and '.'}{near}")
    home = import_module(f".{_MODULES[name]}", __name__)
    found = import_module(".messages", __name__).refuse_unknown(getattr(home, name), f"nl.{name}")
    setattr(home, name, found)  # where pickle looks for it
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
