"""The catalogue: every metric, by its long name and its short ones."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from . import (
    activation,
    alignment,
    binning,
    cca,
    cka,
    class_activation,
    class_synergy,
    classes,
    composite,
    conditional,
    decay,
    directions,
    downstream,
    edge,
    gradient,
    information,
    multivariate,
    sampling,
    spectrum,
    subspace,
    synergy,
    weight,
)
from .base import Metric, Need

METRICS: tuple[type[Metric], ...] = (
    *activation.METRICS,
    *class_activation.METRICS,
    *alignment.METRICS,
    *information.METRICS,
    *synergy.METRICS,
    *conditional.METRICS,
    *binning.METRICS,
    *multivariate.METRICS,
    *classes.METRICS,
    *class_synergy.METRICS,
    *gradient.METRICS,
    *weight.METRICS,
    *spectrum.METRICS,
    *decay.METRICS,
    *directions.METRICS,
    *edge.METRICS,
    *cka.METRICS,
    *subspace.METRICS,
    *cca.METRICS,
    *downstream.METRICS,
    *sampling.METRICS,
    *composite.METRICS,
)
globals().update({metric.__name__: metric for metric in METRICS})
_BY_NAME: dict[str, tuple[type[Metric], Mapping[str, Any]]] = {
    name: (metric, metric.presets.get(name, {})) for metric in METRICS for name in (*metric.names, *metric.presets)
}


def list_metrics() -> list[str]:
    """Every name that ``get_metric`` takes, long and short."""
    return sorted(_BY_NAME)


def get_metric(name: str, **options: Any) -> Metric:
    """The metric of a name, with options.

    >>> get_metric("rq", relative=False).options
    {'relative': False, 'regularization': 0.0}

    Raises ValueError for an unknown name or option, with the nearest one.
    """
    if name not in _BY_NAME:
        raise ValueError(f"no metric is called {name!r}{_nearest(name, _BY_NAME)}; nl.list_metrics() has them all")
    metric, preset = _BY_NAME[name]
    known = [f.name for f in fields(metric)]
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}{_nearest(option, known)}; it takes {', '.join(known) or 'none'}")
    return metric(**{**preset, **options})


def _nearest(word: str, words: Any) -> str:
    near = difflib.get_close_matches(word, list(words), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


__all__ = ["METRICS", "Metric", "Need", "get_metric", "list_metrics", *(m.__name__ for m in METRICS)]
