"""The registry: finds the metric classes in the files of this package and looks them up by name."""

import difflib
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from typing import Any, TypeVar

from nodelens.compat.names import LEFT_OUT
from nodelens.messages import either

from .base import Metric

_M = TypeVar("_M", bound=type[Metric] | Metric)
_BY_NAME: dict[str, tuple[type[Metric], Mapping[str, Any]]] = {}


def find_metrics(
    package: str, path: Any, aliases: Mapping[str, tuple[str, Mapping[str, Any]]] | None = None
) -> tuple[type[Metric], ...]:
    """Registers the metrics that the files of a package define, classes with ``names``, and returns them in the order of the files.

    aliases: {alias: (name, options)}, further names of these metrics. Raises ValueError for a name that is used twice, or an
    alias of an unknown name.
    """
    files = (import_module(f"{package}.{file.name}") for file in pkgutil.iter_modules(path) if not file.name.startswith("_"))
    found = tuple(each for file in files for each in vars(file).values() if _is_metric_of(file.__name__, each))
    for metric in found:
        for name in (*metric.names, *metric.presets):
            if name in _BY_NAME:
                raise ValueError(f"metric name {name!r} of {_home(metric)} is taken: {_home(_BY_NAME[name][0])} has it")
            _BY_NAME[name] = metric, metric.presets.get(name, {})
    for alias, (name, options) in (aliases or {}).items():
        if alias in _BY_NAME:
            raise ValueError(f"the alias {alias!r} of {name!r} is the name of {_home(_BY_NAME[alias][0])}")
        if name not in _BY_NAME:
            raise ValueError(f"the alias {alias!r} stands for {name!r}, which is no metric's name")
        metric, preset = _BY_NAME[name]
        _BY_NAME[alias] = metric, {**preset, **options}
    return found


def _is_metric_of(module: str, value: Any) -> bool:
    """Whether a module defines this metric: a subclass of Metric, with names of its own."""
    return isinstance(value, type) and issubclass(value, Metric) and value.__module__ == module and bool(vars(value).get("names"))


def register_metric(metric: _M, *names: str) -> _M:
    """Registers a user's metric under its class's ``names`` or the names given, and returns it, so it also works as a decorator.

    From then on, in this process, the name works wherever a metric's name does: in ``get_metric`` and ``list_metrics``,
    ``nl.analyze(metrics=["mine"])``, ``nl.analyze_model``, as a part of a composite, and as a pruning criterion. An object keeps
    its options: ``register_metric(get_metric("rq", relative=False), "rq_raw")``. Registering the same class again, as when a
    notebook cell is rerun, replaces the first.

    Raises ValueError, and registers nothing, for an object that is not a metric, has no name, or has the name of another metric.
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
    """All names that ``get_metric`` accepts."""
    return sorted(_BY_NAME)


def metric_classes() -> list[type[Metric]]:
    """All registered classes, each once, in the order of registration."""
    return list(dict.fromkeys(metric for metric, _ in _BY_NAME.values()))


def names_of(name: str) -> list[str]:
    """All names of the same metric with the same options, including the given one. Raises like ``get_metric``."""
    get_metric(name)
    return [other for other, found in _BY_NAME.items() if found == _BY_NAME[name]]


def get_metric(name: str, **options: Any) -> Metric:
    """The metric with a name, with options.

    >>> get_metric("rq", relative=False).options
    {'relative': False, 'regularization': 0.0}

    Raises ValueError for an unknown name or option and suggests the closest one.
    """
    if not isinstance(name, str):
        raise TypeError(f"a metric is given by its name, such as 'rq', not as {type(name).__name__}")
    if name in LEFT_OUT and name not in _BY_NAME:
        raise ValueError(f"no metric is called {name!r}, a name of NodeLens that is left out: {LEFT_OUT[name]}")
    if name not in _BY_NAME:
        every = either("nl.list_metrics() has", "--help lists")
        raise ValueError(f"no metric is called {name!r}{_nearest(name, _BY_NAME)}; {every} them all")
    metric, preset = _BY_NAME[name]
    known = [f.name for f in fields(metric)]
    for option in options:
        if option in metric.lacks:
            raise ValueError(f"{name} has no option {option!r}: {metric.lacks[option]}")
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}{_nearest(option, known)}; it takes {', '.join(known) or 'none'}")
    return metric(**{**preset, **options})


def _nearest(word: str, words: Any) -> str:
    near = difflib.get_close_matches(word, list(words), 1)
    return f"; did you mean {near[0]!r}?" if near else ""
