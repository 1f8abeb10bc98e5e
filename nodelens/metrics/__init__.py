"""The catalogue: every metric, by its long name and its short ones."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

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
_M = TypeVar("_M", bound=type[Metric] | Metric)
_BY_NAME: dict[str, tuple[type[Metric], Mapping[str, Any]]] = {
    name: (metric, metric.presets.get(name, {})) for metric in METRICS for name in (*metric.names, *metric.presets)
}


def register_metric(metric: _M, *names: str) -> _M:
    """Makes a metric of the user's own known by name, as its class's ``names`` or as those given; returns it: a decorator too.

    From then on, in this process, ``get_metric`` and ``list_metrics`` know it, and so does whatever takes a metric's name:
    ``nl.analyze(metrics=["mine"])``, ``nl.analyze_model``, a part of a composite, a pruning criterion. An object brings its
    options along: ``register_metric(get_metric("rq", relative=False), "rq_raw")``. The same class again, as when a notebook's
    cell is run twice, takes the place of the first.

    Raises ValueError for what is no metric, has no name, or has one that is another metric's: nothing is registered then.
    """
    kind = metric if isinstance(metric, type) else type(metric)
    if not issubclass(kind, Metric):
        raise ValueError(f"register_metric takes a Metric, its class or an object, not {metric!r}")
    options = {} if isinstance(metric, type) else metric.options
    presets = {} if names or options else dict(kind.presets)
    names = names or kind.names
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{kind.__name__} has no name: give its class names = ('mine',), or register_metric(metric, 'mine')")
    for name in _BY_NAME.keys() & {*names, *presets}:
        there = _BY_NAME[name][0]
        if there in METRICS or _home(there) != _home(kind):
            raise ValueError(f"metric name {name!r} of {_home(kind)} is taken: {_home(there)} has it; choose another")
    found = dict.fromkeys(names, (kind, options)) | {name: (kind, preset) for name, preset in presets.items()}
    for name, (_, chosen) in found.items():
        try:
            kind(**chosen)
        except TypeError as error:
            raise ValueError(
                f"metric {name!r} of {_home(kind)} cannot be made without options: {error}; give each a default"
            ) from None
    _BY_NAME.update(found)
    return metric


def _home(metric: type[Metric]) -> str:
    return f"{metric.__module__}.{metric.__qualname__}"


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


__all__ = ["METRICS", "Metric", "Need", "get_metric", "list_metrics", "register_metric", *(m.__name__ for m in METRICS)]
