"""What is differentiated in one batch, while its graph is there: one kind of derivative after the other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from nodelens.metrics import Need
from nodelens.metrics.derivative import Derivative
from nodelens.network.batch import Batch
from nodelens.network.curvature import Predictions, drawn, factor
from nodelens.network.derivatives import Differentiation, Forward
from nodelens.network.layers import ASSOCIATION
from nodelens.network.objective import Objective
from nodelens.network.random_vectors import signs
from nodelens.network.tail import is_entrywise

from .association_methods import CHUNK
from .derivative_collector import DerivativeCollector, LayerCall
from .graph_start import GraphStart
from .unit_vectors import unit_vectors

Chunk = tuple[int, list[Tensor]]  # a fold, and vectors (k, *shape of each output or input)


class SumTarget(NamedTuple):
    """Where vectors are added up: at one call of a layer, or at those of all layers side by side."""

    collector: DerivativeCollector
    need: Need
    calls: Sequence[LayerCall]


@dataclass
class Derivatives:
    """The derivatives of one batch."""

    predictions: Tensor
    embedded: Sequence[Tensor]
    batch: Batch
    objective: Objective
    seed: int
    method: Differentiation

    def add(self, targets: Sequence[SumTarget], derivative: Derivative) -> None:
        """Adds one kind of derivative at all layers that ask for it."""
        calls = _distinct(targets, derivative)
        size = self._size(calls)
        if derivative.of == "values":
            self._distribute(targets, derivative, calls, [call.traced.value[None] for call in calls], 0, True)
        elif derivative.of in ("predictions", "loss"):
            self._pull(targets, derivative, calls, size)
        elif derivative.of == "inputs":
            self._push(targets, derivative, calls, size)
        else:
            self._hessian(targets, derivative)

    def add_together(self, wanted: Mapping[Derivative, Sequence[SumTarget]]) -> bool:
        """Adds exact derivatives of predictions and of their loss, which differ in the vectors alone, in one backward pass.

        Returns whether it did: it does where they are wanted of the same calls, and the vectors of all can be handled at once.
        """
        first, *others = [_distinct(targets, derivative) for derivative, targets in wanted.items()]
        made = [Predictions.of(self.predictions, self.batch, self.objective, derivative.of == "loss") for derivative in wanted]
        counts = [each.z[0].numel() for each in made]
        same = all({*map(id, calls)} == {*map(id, first)} for calls in others)
        if not same or sum(counts) > self._size(first) or not self.predictions.requires_grad:
            return False
        edges, spans, vectors = [call.traced.edge for call in first], _spans(counts), []
        for derivative, each, span in zip(wanted, made, spans, strict=True):
            ((_, (own,)),) = self._of_predictions(derivative, each, each.z[0].numel())
            vectors.append(own.new_zeros(sum(counts), *own.shape[1:]))
            vectors[-1][span] = own
        found = self.method.pull([each.z for each in made], edges, vectors)  # type: ignore[arg-type]
        for (derivative, targets), span in zip(wanted.items(), spans, strict=True):
            self._distribute(targets, derivative, first, [None if v is None else v[span] for v in found], 0, True)
        return True

    def _pull(self, targets: Sequence[SumTarget], derivative: Derivative, calls: Sequence[LayerCall], size: int) -> None:
        made = Predictions.of(self.predictions, self.batch, self.objective, derivative.of == "loss")
        empirical = derivative.method == "empirical"
        outputs = [self.predictions if empirical else made.z]
        chunks = iter([(0, [self._slope()[None]])]) if empirical else self._of_predictions(derivative, made, size)
        edges, first = [call.traced.edge for call in calls], True
        for fold, vectors in chunks:
            found = self.method.pull(outputs, edges, vectors) if outputs[0].requires_grad else [None] * len(edges)  # type: ignore[arg-type]
            self._distribute(targets, derivative, calls, found, fold, first)
            first = False

    def _slope(self) -> Tensor:
        """The derivative of the loss with respect to the predictions."""
        z = self.predictions.detach().requires_grad_()
        return torch.autograd.grad(self.objective.summed(z, self.batch.labels), z)[0]

    def _of_predictions(self, derivative: Derivative, made: Predictions, size: int) -> Iterator[Chunk]:
        z, task = made.z, self.objective.task
        mask = made.counted.to(z.device)[..., None]
        places, outputs = z.shape[1:]
        if derivative.method in ("probes", "sampled"):
            m = derivative.vectors
            for fold in range(derivative.folds):
                numbers = range(fold, m, derivative.folds)
                for a in range(0, len(numbers), size):
                    own = numbers[a : a + size]
                    if derivative.of == "loss":
                        v = torch.stack([drawn(made, task, self.batch, k, self.seed) for k in own])
                    else:
                        v = signs(self.batch.hashes, made.rows, outputs, own, self.seed, "predictions", z.detach())
                    yield fold, [(v / m**0.5).where(mask, 0)]
            return
        rows = factor(made, task) if derivative.of == "loss" else None
        for a in range(0, places * outputs, size):
            index = torch.arange(a, min(a + size, places * outputs), device=z.device)
            each = torch.arange(len(index), device=z.device)
            v = torch.zeros(len(index), *z.shape, dtype=z.dtype, device=z.device)
            v[each, :, index // outputs] = 0 if rows is None else rows[index % outputs, :, index // outputs]
            if rows is None:
                v[each, :, index // outputs, index % outputs] = 1
            yield 0, [v.where(mask, 0)]

    def _push(self, targets: Sequence[SumTarget], derivative: Derivative, calls: Sequence[LayerCall], size: int) -> None:
        start = GraphStart.of([call.traced.edge for call in calls], self.embedded, self.batch, self.method.roots)  # type: ignore[misc]
        if start is None:
            for target in targets:
                target.collector.failed[target.need] = "the model reads no floating-point inputs and has no embedding"
            return
        exact, rest = derivative.method == "exact", []
        for target in targets:
            if exact and _is_entrywise(target, start):
                self._of_entries(target, derivative, start)
            elif exact and _fewer_units(target, start):
                (call,) = target.calls
                self._over_units(target, derivative, partial(self._there_and_back, call, start, self._forward(call, start)))
            else:
                rest.append(target)
        read = {id(call) for target in rest for call in target.calls}
        own, first = [call for call in calls if id(call) in read], True
        forwards = [self._forward(call, start) for call in own]
        for fold, vectors in start.vectors(derivative, self.batch, self.seed, max(1, size // 2)) if rest else ():
            found = [self.method.push(forward, vectors) for forward in forwards]
            self._distribute(rest, derivative, own, found, fold, first)
            first = False

    def _forward(self, call: LayerCall, start: GraphStart) -> Forward:
        return Forward(call.traced.edge, call.traced.value, start.places)  # type: ignore[arg-type]

    def _of_entries(self, target: SumTarget, derivative: Derivative, start: GraphStart) -> None:
        """Adds J J' where each unit is a function of the same output of a Linear W: it is dd' times WW', d the slopes."""
        (call,) = target.calls
        ones = torch.ones_like(call.traced.value)[None]
        slopes = self.method.pull([call.traced.edge], start.places, [ones])  # type: ignore[list-item]
        keep = self._kept(target, derivative)
        target.collector.add(target.need, self.batch, call.rows(slopes[0]), keep, gram=start.gram)  # type: ignore[arg-type]

    def _there_and_back(self, call: LayerCall, start: GraphStart, forward: Forward, v: Tensor) -> Tensor | None:
        """J J'v of a layer, J its derivative with respect to the inputs."""
        found = self.method.pull([call.traced.edge], start.places, [v])  # type: ignore[list-item]
        if any(each is None for each in found):
            return None
        return self.method.push(forward, start.weighted(found))  # type: ignore[arg-type]

    def _hessian(self, targets: Sequence[SumTarget], derivative: Derivative) -> None:
        total = self.objective.summed(self.predictions, self.batch.labels)
        edges: Any = [target.calls[0].traced.edge for target in targets]
        slopes: Any = [None] * len(edges)
        if total.requires_grad:
            slopes = torch.autograd.grad(total, edges, create_graph=True, allow_unused=True)
        for target, slope, edge in zip(targets, slopes, edges, strict=True):
            if slope is None:
                target.collector.unreached.add(target.need)
            self._over_units(target, derivative, partial(self._curved, slope, edge))

    def _curved(self, slope: Tensor | None, edge: GradientEdge, v: Tensor) -> Tensor | None:
        """H v, the derivative of the slope of the loss; None where the slope is constant."""
        return self.method.pull([slope], [edge], [v])[0] if slope is not None and slope.requires_grad else None

    def _over_units(self, target: SumTarget, derivative: Derivative, times: Callable[[Tensor], Tensor | None]) -> None:
        """Adds v (A v)' for vectors v over the units of one layer, given the product with A."""
        (call,) = target.calls
        keep, first = self._kept(target, derivative), True
        for fold, v in unit_vectors(call, derivative, keep, self.batch, self.seed, self._size([call])):
            product = times(v)
            y = call.rows(torch.zeros_like(v) if product is None else product)
            target.collector.add(target.need, self.batch, call.rows(v), keep, y, first, fold=fold)
            first = False

    def _distribute(
        self,
        targets: Sequence[SumTarget],
        derivative: Derivative,
        calls: Sequence[LayerCall],
        found: Sequence[Tensor | None],
        fold: int,
        first: bool,
    ) -> None:
        """Adds the vectors found at each call to the targets that read it."""
        by_call = {id(call): vectors for call, vectors in zip(calls, found, strict=True)}
        k = next((len(vectors) for vectors in found if vectors is not None), 1)
        for target in targets:
            parts = []
            for call in target.calls:
                vectors, value = by_call.get(id(call)), call.traced.value
                if vectors is None:
                    target.collector.unreached.add(target.need)
                parts.append(call.rows(value.new_zeros(k, *value.shape) if vectors is None else vectors))
            x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            if len(target.calls) > 1 or target.collector is not target.calls[0].collector:
                x = target.collector.chosen_units(x)
            keep = self._kept(target, derivative)
            target.collector.add(target.need, self.batch, x, keep, first=first, fold=fold)

    def _kept(self, target: SumTarget, derivative: Derivative) -> Tensor:
        """The rows that count, (samples, positions): of a loss those of samples with a label."""
        first, *others = (call.kept for call in target.calls)
        keep = torch.stack([first, *others]).all(0) if others else first
        labelled = self.batch.labelled if derivative.of in ("loss", "hessian") else None
        return keep if labelled is None else keep & labelled.cpu()[:, None]

    def _size(self, calls: Sequence[LayerCall]) -> int:
        held = self.predictions.nbytes + sum(call.traced.value.nbytes for call in calls)
        return max(1, CHUNK // max(1, held))


def differentiate(
    collectors: Sequence[DerivativeCollector],
    predictions: Tensor,
    embedded: Sequence[Tensor],
    batch: Batch,
    objective: Objective,
    seed: int,
    method: Differentiation,
) -> None:
    """Adds what the needs of all collectors ask for in one batch, and releases its graph."""
    own = Derivatives(predictions, embedded, batch, objective, seed, method)
    wanted: dict[Derivative, list[SumTarget]] = {}
    for collector in collectors:
        for need in collector.sums:
            for calls in _calls_of(collector, collectors):
                wanted.setdefault(need.options[0], []).append(SumTarget(collector, need, calls))
    exact = {d: targets for d, targets in wanted.items() if d.of in ("predictions", "loss") and d.method == "exact"}
    together = exact if len(exact) > 1 and own.add_together(exact) else {}
    for derivative, targets in wanted.items():
        if derivative not in together:
            own.add(targets, derivative)
    for collector in collectors:
        for call in collector.calls:
            if call.traced.leaf is not None:
                call.traced.leaf.requires_grad_(False)
        collector.calls = []


def _distinct(targets: Sequence[SumTarget], derivative: Derivative) -> list[LayerCall]:
    """The calls that targets read, each once, without those outside the graph."""
    calls = {id(call): call for target in targets for call in target.calls}.values()
    return [call for call in calls if call.traced.edge is not None or derivative.of == "values"]


def _spans(counts: Sequence[int]) -> list[slice]:
    """Consecutive spans of these lengths."""
    ends = list(accumulate(counts))
    return [slice(end - n, end) for n, end in zip(counts, ends, strict=True)]


def _fewer_units(target: SumTarget, start: GraphStart) -> bool:
    """Whether a layer has so few units and positions that a basis of theirs takes fewer passes than one of the inputs."""
    if len(target.calls) > 1 or target.collector.site.layer is target.collector.plan.stack:
        return False
    _, units, positions = target.calls[0].rows(target.calls[0].traced.value[None]).shape
    return 2 * units * positions < start.count


def _is_entrywise(target: SumTarget, start: GraphStart) -> bool:
    """Whether all units of a layer are read, one per row, and each is a function of one output of the Linear at the start."""
    if start.basis is None or len(target.calls) > 1 or target.collector.site.layer is target.collector.plan.stack:
        return False
    (call,) = target.calls
    flat = call.traced.value.shape == (len(call.keep), start.basis.shape[1])
    return flat and target.collector.site.port == ASSOCIATION and is_entrywise(call.traced.edge, start.places[0])  # type: ignore[arg-type]


def _calls_of(collector: DerivativeCollector, every: Sequence[DerivativeCollector]) -> list[list[LayerCall]]:
    """The calls whose units are side by side: each by itself for a layer, those of all layers together for the stack."""
    if collector.site.layer is not collector.plan.stack:
        return [[call] for call in collector.calls]
    by_layer = {other.site.layer: other.calls for other in every if other.site.port == ASSOCIATION}
    return [[call for layer in collector.plan.layers for call in by_layer[layer]]]
