"""Gradients that do not arrive: a layer on which the loss depends, but which no gradient reaches, has no score, rather than 0."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.messages import option
from nodelens.metrics import Need
from nodelens.metrics.model_sums import ModelSums
from nodelens.network.batch import Batch
from nodelens.network.group_layer import GroupLayer
from nodelens.network.hooks import Awaited, Capture, Site, edit, observed
from nodelens.network.layers import Layer
from nodelens.network.objective import Objective
from nodelens.statistics import Accumulator
from nodelens.statistics.processes import gathered

from .collect import Pass
from .plan import Plan

_SAME = 1e-6  # relative difference of two losses that are equal but for rounding


def check_gradients(model: nn.Module, plan: Plan, capture: Capture, collected: Pass, objective: Objective, batch: Batch) -> None:
    """Checks after a batch that each gradient that the metrics await has arrived.

    Raises ValueError, with the reason, if the loss depends on a layer that no gradient has reached; if the plan can do without the
    layer, the pass gets the reason. Another layer without a gradient is one that the loss does not depend on, and adds 0.
    """
    check_derivatives(model, collected, objective, batch)
    lost = [awaited for awaited, arrived in capture.arrived.items() if not arrived]
    lost += [_of_weight(group, piece.module) for each in collected.model_sums for group, piece in each.lost()]
    check_arrived(_names(plan), model, lost, batch, objective, collected.no_gradient if plan.optional else None)


def unread_layers(plan: Plan, collected: Pass) -> tuple[dict[str, str], dict[str, str]]:
    """The layers of which no rows could be made, and those that no gradient reached, in any process, and why. Collective."""
    every = gathered((collected.unread, collected.no_gradient))
    unread, lost = ({name: why for part in every for name, why in part[k].items()} for k in (0, 1))
    sums = {(layer, "grad" in need.port): a.value for (layer, need), a in collected.sums().items() if isinstance(a, Accumulator)}
    if plan.optional and any(value is not None for value in sums.values()):
        empty = [key for key, value in sums.items() if value is None]
        unread = {layer: "no rows of it were seen" for layer, of_gradients in empty if not of_gradients} | unread
        unmoved = "no gradient reached it: the loss does not depend on it"
        lost = {layer: unmoved for layer, of_gradients in empty if of_gradients} | lost
    return unread, lost


def check_derivatives(model: nn.Module, collected: Pass, objective: Objective, batch: Batch) -> None:
    """Notes, after a batch, why a layer has no derivative although the predictions depend on it; without that, it is zero."""
    for collector in collected.derivatives:
        for need in collector.unreached:
            layer = collector.site.layer
            if need.options[0].of == "inputs":
                reason = (
                    "its derivative with respect to the inputs does not exist: it does not depend on them, or .detach() cuts it"
                )
                collector.failed[need] = f"{reason}; leave the layer out (layers=)"
            elif layer is not collected.plan.stack and _moves(model, layer, batch, objective):
                reason = "the predictions depend on it, but have no derivative there: .detach(), .data or torch.no_grad() cuts it"
                collector.failed[need] = f"{reason}, or an operation such as argmax; leave the layer out (layers=)"


def underived(collected: Pass) -> dict[tuple[str, Need], str]:
    """Why derivatives do not exist, by layer and need, in any process. Collective."""
    own = {(c.site.layer.name, need): reason for c in collected.derivatives for need, reason in c.failed.items()}
    return {key: reason for part in gathered(own) for key, reason in part.items()}


def check_weights(model: nn.Module, plan: Plan, sums: Iterable[ModelSums], objective: Objective, batch: Batch) -> None:
    """Raises ValueError, after the last batch, for a group none of whose weights got a gradient although their modules ran."""
    for each in sums:
        lost = each.lost()
        for group in dict.fromkeys(group for group, _ in lost):
            own = [piece for other, piece in lost if other is group]
            awaited = [_of_weight(group, piece.module) for piece in own]
            if len(own) == len(each.pieces(group)) and check_arrived(_names(plan), model, awaited, batch, objective):
                raise ValueError(no_gradient(_names(plan), group, "the loss does not depend on its weights"))


def check_arrived(
    names: str,
    model: nn.Module,
    lost: Sequence[Awaited],
    batch: Batch,
    objective: Objective,
    reasons: dict[str, str] | None = None,
) -> bool:
    """Raises ValueError if the loss depends on a layer whose gradient was awaited in vain; returns whether any of them runs.

    names: of the metrics, for the message. reasons: gets the reason by layer, instead of an error, except for pruning groups.
    """
    if not lost:
        return False
    recorded = dict[nn.Module, bool]()

    def see(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        recorded[module] = recorded.get(module, False) or torch.is_grad_enabled()

    with torch.enable_grad(), observed(dict.fromkeys(each.layer.module for each in lost), see):
        total = objective.summed(objective.run(model, batch).detach().requires_grad_(), batch.labels)
    if not total.requires_grad:
        way_out = "compute it from the logits with torch operations"
        raise ValueError(f"{names}: {option('loss')}= gives a number without a gradient: {way_out}")
    for site, layer in lost:
        if layer.module in recorded and _depends(model, layer, batch, objective, total.detach()):
            reason = _reason(site, layer, recorded[layer.module])
            if reasons is None or isinstance(site.layer, GroupLayer):
                raise ValueError(no_gradient(names, site.layer, reason))
            reasons[site.layer.name] = f"no gradient reached it: {reason}"
    return bool(recorded)


def no_gradient(names: str, layer: Layer, reason: str) -> str:
    """The message for a layer, or a pruning group, that no gradient reaches."""
    if isinstance(layer, GroupLayer):
        way_out = "score it by weights (magnitude), or leave it out (freeze=)"
        return f"{names}: no gradient reached group {layer.title!r}: {reason}; {way_out}"
    return f"{names}: no gradient reached layer {layer.title!r}: {reason}; leave the layer out (layers=)"


def _reason(site: Site, layer: Layer, recorded: bool) -> str:
    name = layer.title.removesuffix(".input")
    where = "it" if name == site.layer.title and not isinstance(site.layer, GroupLayer) else repr(name)
    if recorded:
        return f"the loss depends on {where}, but .detach() or .data cuts its gradient"
    return f"{where} runs under torch.no_grad(), or in a re-entrant checkpoint (use_reentrant=False records gradients)"


def _depends(model: nn.Module, layer: Layer, batch: Batch, objective: Objective, expected: Tensor) -> bool:
    """Whether the loss changes with what the layer reads or puts out."""
    found = objective.summed(_moved(model, layer, batch, objective), batch.labels)
    return not torch.isclose(found, expected, rtol=_SAME, atol=0, equal_nan=True).all()


def _moves(model: nn.Module, layer: Layer, batch: Batch, objective: Objective) -> bool:
    """Whether the predictions change with what the layer reads or puts out."""
    with torch.no_grad():
        plain = objective.run(model, batch)
    return not torch.allclose(_moved(model, layer, batch, objective), plain, rtol=_SAME, equal_nan=True)


def _moved(model: nn.Module, layer: Layer, batch: Batch, objective: Objective) -> Tensor:
    """The predictions where what the layer reads or puts out is another."""

    def moved(x: Tensor) -> Tensor:
        return x + torch.linspace(-1, 2, x.numel(), device=x.device).reshape(x.shape).to(x) if x.is_floating_point() else x

    reads = layer.side == "input"
    with torch.no_grad(), edit({} if reads else {layer.module: moved}, {layer.module: moved} if reads else {}):
        return objective.run(model, batch)


def _of_weight(group: GroupLayer, path: str) -> Awaited:
    return Awaited(Site(group, "model"), Layer(path, group.module.get_submodule(path)))


def _names(plan: Plan) -> str:
    """The names of the metrics that read gradients."""
    needs = {name: metric.needs().values() for name, metric in plan.metrics.items()}
    return ", ".join(name for name, every in needs.items() if any("grad" in n.port or n.port == "model" for n in every))
