"""Associations in a plan: all layers side by side, and what cannot be computed at any layer."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from nodelens.metrics import Metric
from nodelens.metrics.derivative import Derivative
from nodelens.network.layers import ASSOCIATION, Layer
from nodelens.statistics.located import Located

from .dry_run import Seen
from .layout import PassLayout

ALL_LAYERS = "all"  # the layer of a matrix of the units of all layers
_Plan = TypeVar("_Plan", bound=PassLayout)


@dataclass(frozen=True, eq=False)
class StackedLayers(Layer):
    """All layers side by side as one, called ``all``. No module puts its units out."""

    @property
    def title(self) -> str:
        return ALL_LAYERS

    @property
    def tensor(self) -> None:
        """None: its units have weights in several layers."""
        return None


def differentiates(metrics: Iterable[Metric]) -> bool:
    """Whether any of the metrics reads derivatives, or the units of all layers side by side."""
    return any(
        metric.options.get("stacked") or any(need.port == ASSOCIATION for need in metric.needs().values()) for metric in metrics
    )


def with_stack(plan: _Plan) -> _Plan:
    """The plan with all its layers side by side, where a metric asks for it."""
    if not any(metric.options.get("stacked") for metric in plan.metrics.values()):
        return plan
    if any(layer.title == ALL_LAYERS for layer in plan.layers):
        raise ValueError(
            f"stacked: a layer is called {ALL_LAYERS!r}, the name of the matrix of all layers: leave the layer, or stacked, out"
        )
    every = [plan.seen(layer, "output") for layer in plan.layers]
    stack = StackedLayers("(all layers)", plan.layers[0].module)
    whole = Seen(sum(s.width for s in every), every[0].positions, all(s.flat for s in every), 1, sum(s.nbytes for s in every))
    dry_run = replace(plan.dry_run, seen={**plan.dry_run.seen, f"{stack.name}.output": whole})
    return replace(plan, stack=stack, dry_run=dry_run)


def check_associations(plan: Any) -> tuple[str, ...]:
    """A line for each association that can be computed at no layer, with the reason at the first one.

    Raises ValueError with that line if nothing else is measured.
    """
    nowhere = []
    for name, metric in plan.metrics.items():
        every = [(place[0], plan.wanted(metric, place)) for place in plan.places(metric)]
        needs = [need for _, found in every for _, need in found.values()]
        if plan.positions and any(need.statistic is Located for need in needs):
            raise ValueError(
                f"{name}: spatial=per_location needs all positions; positions={plan.positions} draws some: leave one of them out"
            )
        reasons = [plan.unread(found) for _, found in every]
        if any(need.port == ASSOCIATION for need in needs) and all(reasons):
            nowhere.append(f"{name} of layer {every[0][0].title!r}: {reasons[0]}")
    if nowhere and len(nowhere) == len(plan.metrics):
        raise ValueError(nowhere[0])
    return tuple(nowhere)


def methods_of(plan: Any) -> list[dict[str, Any]]:
    """Entries of the metadata: how each association was computed at each layer, and why so."""
    found = []
    for name, metric in plan.metrics.items():
        for place in plan.places(metric):
            for _, need in plan.wanted(metric, place).values():
                if need.port == ASSOCIATION:
                    found.append({"metric": name, "layer": place[0].title, **_described(need.options[0])})
    return found


def _described(derivative: Derivative) -> dict[str, Any]:
    what = {"predictions": "Jacobian", "loss": "Gauss-Newton", "hessian": "Hessian", "inputs": "Jacobian", "values": "values"}
    entry: dict[str, Any] = {"computed": what[derivative.of], "method": derivative.method}
    entry |= {"vectors": derivative.vectors} if derivative.vectors else {}
    return entry | {key: text for key in ("why", "refused") if (text := getattr(derivative, key))}


def zero_associations(plan: Any, matrices: dict[tuple[str, str], Any]) -> list[str]:
    """A warning for each association that is zero for all units of a layer."""
    associations = [name for name, metric in plan.metrics.items() if metric.kind == "pair" and "stacked" in metric.options]
    return [
        f"{name} of layer {layer!r} is zero for all units: they do not vary, or nothing depends on them; leave it out (layers=)"
        for (layer, name), matrix in matrices.items()
        if name in associations and matrix.size and not matrix.any()
    ]
