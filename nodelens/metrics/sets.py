"""Sets of metrics by name: the files of ``conf/metrics``, which the command line reads too."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from .base import Metric
from .registry import get_metric, metric_classes

_HOMES = Path(__file__).parents[1] / "conf", Path(__file__).parents[2] / "conf"  # in a wheel, in a checkout
_FOLDER = next(home for home in _HOMES if (home / "analyze.yaml").is_file()) / "metrics"


@cache
def list_sets() -> list[str]:
    """The names of all sets of metrics."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


@cache
def metric_set(name: str) -> Mapping[str, Metric]:
    """{column: metric} of a set.

    >>> list(metric_set("scar"))[:2]
    ['scar_activation_power', 'scar_taylor']

    Raises ValueError for an unknown name.
    """
    if name not in list_sets():
        raise ValueError(f"no set of metrics is called {name!r}; there are {', '.join(list_sets())}")
    nodes: dict[str, Any] = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")) or {}
    metrics = {part: get_metric(part) for part in nodes.pop("defaults", [])}
    return metrics | {column: _built(dict(node)) for column, node in nodes.items()}


def is_default(metrics: Mapping[str, Metric]) -> bool:
    """Whether these are the metrics of ``nl.analyze`` where none are chosen."""
    return dict(metrics) == metric_set("default")


def _built(node: dict[str, Any]) -> Metric:
    """The metric of an entry with the name of its class, ``_target_``, and options."""
    kind = node.pop("_target_").rpartition(".")[2]
    return next(each for each in metric_classes() if each.__name__ == kind)(**node)
