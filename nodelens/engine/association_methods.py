"""How an association is computed at a layer: exactly where that is cheap, else estimated, else left out with the way out."""

from dataclasses import dataclass, replace
from typing import Any

from nodelens.messages import option
from nodelens.metrics.association import PROBES
from nodelens.metrics.derivative import Derivative
from nodelens.network.experts import ExpertLayer
from nodelens.network.layers import ASSOCIATION, Layer
from nodelens.network.tasks import BY_TOKEN

PREDICTIONS = 128  # of a sample, up to which the derivative of each is taken
LABELS = 64  # the same for a curvature
INPUTS = 1024  # of a sample, up to which the derivative with respect to each is taken
MOST = 4096  # backward passes per batch
FOLDS = 8
CHUNK = 1 << 24  # bytes of the vectors at layers and predictions that are handled at once: more do not stay in the cache
ENOUGH = 256  # vectors of one group that are worth a product of their own, or as many as there are units
BUFFER = 1 << 25  # bytes of buffered vectors of a layer
COPIES = 3  # of the vectors at the widest layer: sorted by group, without masked rows, in float64


@dataclass(frozen=True)
class Facts:
    """What one forward pass of two samples tells of derivatives.

    smooth: by layer the operations behind it that are not piecewise linear; None where the predictions do not read it
    inputs: number of vectors that the inputs of a sample span, as the first layer reads them
    """

    smooth: dict[str, list[str] | None]
    inputs: int


def settled(derivative: Derivative, layer: Layer, layout: Any) -> Derivative:
    """A derivative with the method that is used at a layer, or the reason why it is left out there. layout: a PassLayout."""
    if isinstance(layer, ExpertLayer):
        reason = "the hidden units of experts pass inside one module, and have no place in the graph of derivatives"
        return replace(derivative, refused=f"{reason}: leave the layer out (layers=), or take forward_cov")
    if layer is layout.stack and (reason := unstackable(layout)):
        return replace(derivative, refused=reason)
    found = _SETTLE[derivative.of](derivative, layer, layout)
    return replace(found, folds=max(1, min(found.vectors, FOLDS))) if found.method in ("probes", "sampled") else found


def unstackable(layout: Any) -> str:
    """Why the units of all layers cannot be put side by side; empty if they can."""
    seen = {layer.title: layout.seen(layer, "output") for layer in layout.layers}
    several = next((name for name, each in seen.items() if each.calls > 1 or each.packed or each.unread), "")
    if several:
        return f"stacked: layer {several!r} has no one row per position, because it runs several times or not for all: leave it out"
    if len({each.positions for each in seen.values()}) > 1:
        listed = ", ".join(f"{name} {each.positions}" for name, each in list(seen.items())[:4])
        return f"stacked: layers have different numbers of rows per sample ({listed}): name layers of one size (layers=)"
    return ""


def _of_values(derivative: Derivative, layer: Layer, layout: Any) -> Derivative:
    return derivative


def _of_predictions(derivative: Derivative, layer: Layer, layout: Any) -> Derivative:
    passes = layout.dry_run.predictions * layout.dry_run.classes
    if derivative.method == "auto" and passes > PREDICTIONS:
        why = f"{passes:,} predictions per sample, more than {PREDICTIONS}"
        return replace(derivative, method="probes", vectors=PROBES, why=why)
    return _exact(derivative, passes, "predictions per sample", "method=hutchinson, or probes=32")


def _of_inputs(derivative: Derivative, layer: Layer, layout: Any) -> Derivative:
    passes = layout.dry_run.facts.inputs if layout.dry_run.facts is not None else 0
    if layer is not layout.stack:
        passes = min(passes, 2 * _vectors(layer, layout))
    if derivative.method == "auto" and passes > INPUTS:
        return replace(derivative, method="probes", vectors=PROBES, why=f"{passes:,} vectors of inputs, more than {INPUTS:,}")
    return _exact(derivative, passes, "vectors of inputs", "method=hutchinson, or probes=32")


def _of_loss(derivative: Derivative, layer: Layer, layout: Any) -> Derivative:
    dry_run, passes = layout.dry_run, layout.dry_run.predictions * layout.dry_run.classes
    if derivative.method == "empirical":
        if not dry_run.labelled:
            way_out = "give (x, y) batches, or curvature=sampled, which draws labels from the model"
            return replace(derivative, refused=f"curvature=empirical needs labels, but the data have none: {way_out}")
        return derivative
    if dry_run.own_loss or dry_run.task == "none":
        given = f"{option('loss')}= is given" if dry_run.own_loss else "the task is none"
        way_out = "use backward_jac, backward_hess or curvature=empirical"
        return replace(derivative, refused=f"the curvature is known for the losses of tasks, but {given}: {way_out}")
    if derivative.method == "sampled" or (derivative.method == "auto" and passes > LABELS):
        why = "" if derivative.method == "sampled" else f"{passes:,} predictions per sample, more than {LABELS}"
        return replace(derivative, method="sampled", why=why)
    return _exact(derivative, passes, "predictions per sample", "curvature=sampled")


def _of_hessian(derivative: Derivative, layer: Layer, layout: Any) -> Derivative:
    dry_run = layout.dry_run
    if not dry_run.labelled:
        return replace(
            derivative, refused="the loss needs labels, but the data have none: give (x, y) batches, or use backward_ggn"
        )
    smooth = _smooth(layer, layout)
    entropy = not dry_run.own_loss and dry_run.task in ("classification", *BY_TOKEN)
    few = dry_run.predictions * dry_run.classes <= MOST
    if derivative.method == "auto" and entropy and few and not smooth:
        return Derivative("loss", "exact", why="the network behind it is piecewise linear: the Gauss-Newton matrix is the Hessian")
    if layer is layout.stack:
        reason = "stacked: the Hessian across layers is known where the network is piecewise linear and the loss a cross-entropy"
        return replace(derivative, refused=f"{reason}: use backward_ggn")
    if derivative.method == "auto":
        count = _vectors(layer, layout)
        curved = f"{', '.join(smooth[:3])} behind it" if smooth else "the loss is no cross-entropy" if few else "many predictions"
        if count > MOST:
            way_out = f"use backward_ggn, method=hutchinson, or fewer positions ({option('positions')}=)"
            reason = f"it takes {count:,} products with the Hessian per batch, more than {MOST:,}, because of {curved}"
            return replace(derivative, refused=f"{reason}: {way_out}")
        return replace(derivative, method="exact", why=curved)
    return derivative


def vector_bytes(plan: Any) -> int:
    """Upper bound on the bytes of vectors: handled at once, by the kind of derivative that takes the most, and buffered."""
    layers: dict[Derivative, list[Layer]] = {}
    waiting = [0]
    for layer in plan.read:
        for need in plan.needs(layer):
            if need.port == ASSOCIATION:
                layers.setdefault(need.options[0], []).append(layer)
                waiting.append(_buffered(need.options[0], layer, plan.groups_of(layer, need), plan))
    at_once = [_at_once(derivative, own, plan) for derivative, own in layers.items()]
    return sum(waiting) + max(*at_once, COPIES * max(waiting)) if at_once else 0


def _at_once(derivative: Derivative, layers: list[Layer], plan: Any) -> int:
    dry_run, wide = plan.dry_run, plan.layers if plan.stack in layers else []
    each = [(seen := plan.seen(layer, "output")).nbytes * seen.calls for layer in dict.fromkeys([*layers, *wide])]
    predictions = 4 * dry_run.predictions * dry_run.classes
    held = dry_run.samples * (sum(each) + predictions)
    count = _number_of(derivative, plan, max(1, CHUNK // max(1, held)))
    pairs = 2 if derivative.of == "hessian" else 1  # each vector with its product
    return pairs * count * (held + COPIES * dry_run.samples * max(each))


def enough(width: int) -> int:
    """How many vectors of one group of samples are worth a product of their own."""
    return max(width, ENOUGH)


def capacity(groups: int, width: int) -> int:
    """How many vectors a buffer holds: twice what is enough, because groups differ in size."""
    return 2 * groups * enough(width)


def _buffered(derivative: Derivative, layer: Layer, groups: int, plan: Any) -> int:
    """The bytes of vectors that are buffered at a layer: none where batches are large enough for products of their own."""
    seen, samples, facts = plan.seen(layer, "output"), plan.dry_run.samples, plan.dry_run.facts
    inputs = 0 if facts is None else facts.inputs
    basis = {"inputs": 1 if inputs == seen.width else inputs, "hessian": seen.width * seen.positions}
    vectors = samples * seen.positions * derivative.folds * _number_of(derivative, plan, basis.get(derivative.of, MOST))
    if vectors >= min(groups, samples) * enough(seen.width):
        return 0
    pairs, number = 2 if derivative.of == "hessian" else 1, max(4, seen.nbytes // max(1, seen.width * seen.positions))
    return min(BUFFER, pairs * number * seen.width * capacity(groups, seen.width))


def _number_of(derivative: Derivative, plan: Any, most: int) -> int:
    """How many vectors are handled at once."""
    if derivative.of == "values" or derivative.method == "empirical":
        return 1
    if derivative.vectors:
        return min(most, -(-derivative.vectors // derivative.folds))
    return min(most, plan.dry_run.predictions * plan.dry_run.classes) if derivative.of in ("predictions", "loss") else most


_SETTLE = {
    "values": _of_values,
    "predictions": _of_predictions,
    "inputs": _of_inputs,
    "loss": _of_loss,
    "hessian": _of_hessian,
}


def _exact(derivative: Derivative, passes: int, what: str, way_out: str) -> Derivative:
    if derivative.method == "probes":
        return derivative
    if passes > MOST:
        reason = f"{passes:,} {what} take as many backward passes per batch, more than {MOST:,}"
        return replace(derivative, refused=f"{reason}: use {way_out}")
    return replace(derivative, method="exact", vectors=0)


def _vectors(layer: Layer, layout: Any) -> int:
    """The number of units times positions of a sample."""
    seen = layout.seen(layer, "output")
    width = layout.covariance.count if layout.covariance.restricts(seen.width) else seen.width
    return width * min(seen.positions, layout.positions or seen.positions)


def _smooth(layer: Layer, layout: Any) -> list[str]:
    """The operations behind a layer, or behind any of all layers, that are not piecewise linear."""
    if layout.dry_run.facts is None:
        return ["unknown operations"]
    smooth = layout.dry_run.facts.smooth
    layers = layout.layers if layer is layout.stack else [layer]
    return list(dict.fromkeys(name for each in layers for name in smooth.get(each.name) or ()))
