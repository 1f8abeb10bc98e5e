"""The registry: every metric by its names, one class for each, found in the files of this room."""

import difflib
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from typing import Any, TypeVar

from .base import Metric

_M = TypeVar("_M", bound=type[Metric] | Metric)
_BY_NAME: dict[str, tuple[type[Metric], Mapping[str, Any]]] = {}


def find_metrics(
    package: str, path: Any, aliases: Mapping[str, tuple[str, Mapping[str, Any]]] | None = None
) -> tuple[type[Metric], ...]:
    """Registers the classes that the files of a package list as METRICS, in the order of the files' names, and returns them.

    aliases: {alias: (name, options)}, further names of these metrics. Raises ValueError for a name that is given twice, or an
    alias of a name that does not exist.
    """
    files = (import_module(f"{package}.{file.name}") for file in pkgutil.iter_modules(path) if not file.name.startswith("_"))
    found = tuple(metric for file in files for metric in getattr(file, "METRICS", ()))
    for metric in found:
        for name in (*metric.names, *metric.presets):
            if name in _BY_NAME:
                raise ValueError(f"metric name {name!r} of {_home(metric)} is taken: {_home(_BY_NAME[name][0])} has it")
            _BY_NAME[name] = metric, metric.presets.get(name, {})
    for alias, (name, options) in (aliases or {}).items():
        if alias in _BY_NAME:
            raise ValueError(f"the alias {alias!r} of {name!r} is the name of {_home(_BY_NAME[alias][0])}")
        if name not in _BY_NAME:
            raise ValueError(f"the alias {alias!r} stands for {name!r}, which is the name of no metric")
        metric, preset = _BY_NAME[name]
        _BY_NAME[alias] = metric, {**preset, **options}
    return found


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
        if there.__module__.startswith(f"{__package__}.") or _home(there) != _home(kind):
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


def metric_classes() -> list[type[Metric]]:
    """Every class that has a name, once, in the order of the files."""
    return list(dict.fromkeys(metric for metric, _ in _BY_NAME.values()))


def names_of(name: str) -> list[str]:
    """Every name of the same metric with the same options, the name itself included. Errors as in ``get_metric``."""
    get_metric(name)
    return [other for other, found in _BY_NAME.items() if found == _BY_NAME[name]]


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
