"""Hydra's entries for metrics and criteria, made from the metric classes: a class needs no YAML file.

``metrics=rq`` gives the class with its default options, ``criterion=rq`` ranks by the metric alone, in the direction that its
``higher_is_better`` states. A YAML file of the same name in ``conf/`` or in a user's own folder replaces the entry.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import OmegaConf

from nodelens.compat.names import METRIC_ALIASES

from .class_source import read_classes

_METRICS = Path(__file__).parents[1] / "metrics"
Entries = dict[str, dict[str, Any]]  # by group, by name


def store_entries(folders: Sequence[Path], imports: bool = True) -> None:
    """Stores the entries of which the folders hold no file.

    imports: whether to ask the registry, which imports torch; otherwise the source files are read (--help, shell completion).
    """
    for group, nodes in _nodes(imports).items():
        files = {path.name for folder in folders for path in (folder / group).glob("*.yaml")}
        ConfigStore.instance().repo[group] = {name: node for name, node in nodes.items() if name not in files}


class _Node(ConfigNode):
    def __deepcopy__(self, memo: Any) -> "_Node":
        return self  # Hydra copies the whole store for each composition and listing; it copies what it loads once more


def share_nodes() -> None:
    """From now on the nodes that are in Hydra's store are not copied with it: ``--help`` copies the store a hundred times."""
    groups = [ConfigStore.instance().repo]
    for group in groups:
        for name, node in group.items():
            if isinstance(node, dict):
                groups.append(node)
            elif type(node) is ConfigNode:
                group[name] = _Node(**vars(node))


@cache
def _nodes(imports: bool) -> dict[str, dict[str, ConfigNode]]:
    def node(group: str, name: str, value: Any) -> ConfigNode:
        return _Node(f"{name}.yaml", OmegaConf.create({name: value}), group, package=None, provider="nodelens")

    entries = from_registry() if imports else from_source()
    return {group: {f"{name}.yaml": node(group, name, v) for name, v in nodes.items()} for group, nodes in entries.items()}


def from_registry() -> Entries:
    """The entries of the registered classes of this package."""
    from nodelens.metrics import get_metric, list_metrics

    metrics = {name: get_metric(name) for name in list_metrics()}
    own = {name: metric for name, metric in metrics.items() if type(metric).__module__.startswith("nodelens.")}
    worse = {name for name, metric in own.items() if not metric.higher_is_better}
    return {
        "metrics": {name: _metric(type(metric).__name__, metric.options) for name, metric in own.items()},
        "criterion": _criteria((name for name, metric in own.items() if metric.shape == "unit"), worse),
    }


def from_source() -> Entries:
    """The same entries, read from the classes' files."""
    metrics: Entries = {}
    worse: set[str] = set()
    of_units: set[str] = set()
    for each in read_classes(_METRICS):
        for name, options in _options(each).items():
            metrics[name] = _metric(each.name, options)
            kind = each.variables["kind"]
            of_units |= {name} if kind == "unit" or (kind == "pair" and options.get("reduce") == "mean") else set()
            worse |= set() if each.variables["higher_is_better"] else {name}
    for alias, (name, preset) in METRIC_ALIASES.items():
        metrics[alias] = metrics[name] | {key: _plain(value) for key, value in preset.items()}
        for chosen in (of_units, worse):
            chosen |= {alias} if name in chosen else set()
    return {"metrics": metrics, "criterion": _criteria(sorted(of_units), worse)}


def _options(each: Any) -> dict[str, dict[str, Any]]:
    """The options of a class by each of its names."""
    names = dict.fromkeys(each.variables["names"], each.fields)
    return names | {name: {**each.fields, **preset} for name, preset in each.variables["presets"].items()}


def _metric(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    return {"_target_": f"nodelens.metrics.{kind}", **{key: _plain(value) for key, value in options.items()}}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _criteria(names: Iterable[str], worse: set[str]) -> dict[str, Any]:
    return {name: {name: -1.0 if name in worse else 1.0} for name in names}
