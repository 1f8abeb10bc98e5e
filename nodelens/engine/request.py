"""The arguments of a call: resolves metrics and layers given by name or as objects, and describes them for the metadata."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nodelens.messages import kind_of, nearest
from nodelens.metrics import Metric, get_metric, list_metrics
from nodelens.metrics.need import Other
from nodelens.metrics.sets import list_sets, metric_set
from nodelens.network.find_layers import find_layers, resolved
from nodelens.network.group_layer import GroupLayer
from nodelens.network.groups import PruningGroup
from nodelens.network.layers import Layer

from .firing import BEHIND
from .plan import Plan

Metrics = str | Metric | Sequence[str | Metric] | Mapping[str, Metric]
_METRICS = "names such as 'rq', metric objects of nl.get_metric, a list of these, or a dict {column: metric object}"
Layers = str | Sequence[str | Layer | PruningGroup]


def as_metrics(metrics: Metrics) -> dict[str, Metric]:
    """{column: metric} from one or several names, sets by name such as ``forward``, and metric objects.

    Sets may overlap. Raises ValueError for an unknown name, and for one that occurs twice outside of sets.
    """
    if isinstance(metrics, Mapping):
        return {column: _object(metric) for column, metric in metrics.items()}
    if not isinstance(metrics, (str, Metric)) and (isinstance(metrics, type) or not isinstance(metrics, Iterable)):
        raise TypeError(f"metrics is {kind_of(metrics)}; it takes {_METRICS}")
    every = [metrics] if isinstance(metrics, (str, Metric)) else list(metrics)
    of_sets = [metric_set(name) for name in every if isinstance(name, str) and name in list_sets()]
    single: dict[str, Metric] = {}
    for metric in every:
        if isinstance(metric, str) and metric in list_sets():
            continue
        metric = _object(metric) if not isinstance(metric, str) else metric
        name = metric if isinstance(metric, str) else metric.names[-1]
        if name in single:
            raise ValueError(f"metric {name!r} is given twice; give a dict {{column: metric}} to name two variants")
        single[name] = _metric(metric) if isinstance(metric, str) else metric
    return {name: metric for found in [*of_sets, single] for name, metric in found.items()}


def _object(metric: Any) -> Metric:
    """A metric object. Raises TypeError for another, such as the class of a metric."""
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, type) and issubclass(metric, Metric):
        raise TypeError(f"metrics has the class {metric.__name__} in it: give an object, {metric.__name__}()")
    raise TypeError(f"metrics has {kind_of(metric)} in it; it takes {_METRICS}")


def _metric(name: str) -> Metric:
    if name not in list_metrics() and (near := nearest(name, list_sets())):
        raise ValueError(f"no metric or set of metrics is called {name!r}.{near} Sets are {', '.join(list_sets())}")
    return get_metric(name)


def as_layers(model: nn.Module, layers: Layers, start: Mapping[str, Tensor] | None = None) -> list[Layer]:
    """Layers from names, patterns and roles; layers and pruning groups are passed through, the latter as ``GroupLayer``.

    Raises ValueError as ``find_layers`` does, and for none.
    """
    if isinstance(layers, str):
        return find_layers(model, layers, start)
    if not isinstance(layers, Sequence):
        raise TypeError(_no_layer(model, layers, f"layers is {kind_of(layers)}"))
    if not len(layers):
        raise ValueError("layers is empty: give names, roles, layers or pruning groups, or leave it out for all layers")
    given = [layer for layer in layers if not isinstance(layer, str)]
    for each in given:
        if not isinstance(each, (Layer, PruningGroup)):
            raise TypeError(_no_layer(model, each, f"layers has {kind_of(each)} in it"))
    found = [GroupLayer.of(model, each) if isinstance(each, PruningGroup) else each for each in given]
    names = [layer for layer in layers if isinstance(layer, str)]
    return [*(find_layers(model, names, start) if names else []), *found]


def _no_layer(model: nn.Module, given: Any, found: str) -> str:
    name = next((name for name, module in model.named_modules() if module is given and name), None)
    takes = "it takes names, patterns or roles, such as 'fc1' or '*', or a list of these, layers of nl.find_layers and groups"
    return f"{found}; " + (f"name it: layers={name!r}" if name else takes)


def names_of(model: nn.Module, layers: Layers, found: Sequence[Layer]) -> dict[str, list[str]]:
    """{pattern: names of its layers} for the given patterns; without any, each layer's own name."""
    patterns = [layers] if isinstance(layers, str) else [layer for layer in layers if isinstance(layer, str)]
    return resolved(model, patterns) if patterns else {layer.title: [layer.title] for layer in found}


def describe_metrics(plan: Plan) -> dict[str, dict[str, Any]]:
    """The entry of each column in the metadata: its metric, and where the metric read in this pass."""
    return {name: describe(metric) | targets_of(plan, metric) | behind_of(plan, metric) for name, metric in plan.metrics.items()}


def describe(metric: Metric) -> dict[str, Any]:
    """A column's entry in the metadata: the metric's name, options, needs, and when it is NaN."""
    return {
        "metric": metric.names[0],
        "options": {k: getattr(v, "__name__", v) if callable(v) else v for k, v in metric.options.items()},
        "kind": metric.shape,
        "nan": metric.nan,
        "log_interval": metric.log_interval,
        "source": metric.source(),
        "needs": {name: str(need) for name, need in metric.needs().items()},
    }


def targets_of(plan: Plan, metric: Metric) -> dict[str, list[str]]:
    """The names of a metric's targets in this pass, with ``auto`` resolved; empty if it has none."""
    needs = [need for place in plan.places(metric)[:1] for _, need in plan.resolve(metric, place).values()]
    found = [need.target for need in needs if need.target and not isinstance(need.target, Other)]
    return {"targets": list(dict.fromkeys(str(getattr(target, "__name__", target)) for target in found))} if found else {}


def behind_of(plan: Plan, metric: Metric) -> dict[str, dict[str, str]]:
    """{"read_behind": {layer: what its units are read behind}}, for a metric about firing; empty for others.

    "relu", "batch_norm, relu" and the like; "" where no activation follows the layer, so that its own output is read.
    """
    if all(need.port != BEHIND for need in metric.needs().values()):
        return {}
    parts = dict.fromkeys(part for layer in plan.layers for part in plan.parts(metric, layer))
    return {"read_behind": {layer.title: str(plan.dry_run.firing.get(layer.name, "")) for layer in parts}}
