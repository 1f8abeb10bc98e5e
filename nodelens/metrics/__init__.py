"""The metrics: one file per family, one class per metric, and the registry that finds each by name."""

from nodelens.compat.names import METRIC_ALIASES

from .base import Metric
from .need import Need
from .registry import find_metrics, get_metric, list_metrics, register_metric

METRICS: tuple[type[Metric], ...] = find_metrics(__name__, __path__, METRIC_ALIASES)
globals().update({metric.__name__: metric for metric in METRICS})

__all__ = ["METRICS", "Metric", "Need", "get_metric", "list_metrics", "register_metric", *(m.__name__ for m in METRICS)]
