"""The sums that metrics read at a place, over all samples, by group of samples, or without one group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nodelens.metrics import Metric, Need
from nodelens.metrics.weight_values import shared
from nodelens.network.layers import ASSOCIATION, Layer
from nodelens.statistics import Accumulator, Statistic
from nodelens.statistics.costs import adapt

from .layout import Place
from .lost_gradients import no_gradient
from .plan import Plan

Sums = Mapping[tuple[str, Need], Accumulator]


@dataclass(frozen=True)
class SampleCounts:
    """Numbers of samples in each group, (groups,) int64.

    read: of the data; unlabelled: without a label; lost: by layer and port, those with rows, none of which is finite
    """

    read: Tensor
    unlabelled: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    lost: Mapping[tuple[str, str], Tensor] = field(default_factory=dict)

    def of(self, layer: Layer, need: Need, sums: Accumulator) -> Tensor:
        """The samples of each group that have a row in some sums, (groups,)."""
        if need.port == "model" or len(sums.parts) != len(self.read):
            return self.read
        if need.port.startswith(ASSOCIATION) or (need.view == "samples" and need.port != "weight*grad"):
            return torch.tensor([rows_of(part) for part in sums.parts])
        labelled = need.view == "tokens" or "grad" in need.port or need.target == "label"
        found = self.finite(layer, need) - self.unlabelled * labelled
        return found.clamp_min(0)

    def finite(self, layer: Layer, need: Need) -> Tensor:
        """The samples of each group with a finite row at the port of a need, (groups,)."""
        return self.read - self.lost.get((layer.name, need.port), torch.zeros_like(self.read))


def rows_of(value: Any) -> int:
    """Number of rows that a statistic has seen; 0 for None and for sums over the whole model."""
    counted = value.tensors() if isinstance(value, Statistic) else {}
    return int(counted["n" if "n" in counted else "seen"].sum()) if counted else 0


class SharedSums:
    """Sums and weights that several metrics read, each formed once, when it is first read.

    The sums are those over all samples, or over all but one group. What is computed once from weights is kept in ``values``.
    """

    def __init__(self, plan: Plan, without: int | None = None, values: dict[tuple[str, str], dict] | None = None):
        self.plan, self.without, self.values = plan, without, {} if values is None else values
        self._formed: dict[int, Any] = {}  # by the id of the accumulator
        self._weights: dict[tuple[str, str], Any] = {}

    def of(self, accumulator: Any) -> Any:
        """The sum of an accumulator; None if nothing was added."""
        if id(accumulator) not in self._formed:
            value = accumulator.value if self.without is None else accumulator.without(self.without)
            self._formed[id(accumulator)] = value
        return self._formed[id(accumulator)]

    def weight(self, layer: Layer, metric: Metric) -> Any:
        """What a metric reads of a layer besides sums."""
        key = layer.name, metric.parameter
        if key not in self._weights:
            found = self.plan.parameter(layer, metric)
            self._weights[key] = shared(found, self.values.setdefault(key, {})) if isinstance(found, Tensor) else found
        return self._weights[key]

    def release(self, read: Sequence[tuple]) -> None:
        """Drops sums and weights that no further metric reads."""
        for key in read:
            self._formed.pop(key[0], None) if len(key) == 1 else self._weights.pop(key, None)


@dataclass(frozen=True)
class MetricSums:
    """The statistics that a metric reads at a place, by the name of its argument."""

    metric: Metric
    plan: Plan
    place: Place
    resolved: dict[str, tuple[Layer, Need]]
    accumulators: dict[str, Accumulator]

    @classmethod
    def at(cls, metric: Metric, plan: Plan, place: Place, sums: Sums) -> "MetricSums":
        """Those of a pass; none where the metric is left out."""
        resolved = plan.resolve(metric, place)
        held = {name: sums[layer.name, plan.lookup(layer, need)] for name, (layer, need) in resolved.items()}
        return cls(metric, plan, place, resolved, held)

    @cached_property
    def single(self) -> bool:
        """Whether some sums are not kept per group of samples, so that there is no standard error."""
        return self.plan.groups < 2 or any(len(accumulator.parts) < 2 for accumulator in self.accumulators.values())

    def samples(self, samples: SampleCounts) -> Tensor:
        """The samples of each group whose rows the metric reads, (groups,) int64: they weight the jackknife."""
        every = [samples.of(*self.resolved[name], accumulator) for name, accumulator in self.accumulators.items()]
        found = torch.stack([samples.read, *every]).amin(0)
        return found if bool(found.any()) else samples.read

    def without_target(self, samples: SampleCounts) -> dict[str, int]:
        """How many samples are left out because they have no target, for the counts of a metric that pairs samples with one."""
        of_target = {n: each for n, each in self.resolved.items() if isinstance(each[1].target, str) or callable(each[1].target)}
        left = [
            int((samples.finite(layer, need) - samples.of(layer, need, self.accumulators[name])).sum())
            for name, (layer, need) in of_target.items()
            if need.view == "samples"
        ]
        return {"without_target": max(left)} if left and max(left) > 0 else {}

    def read(self, shared: SharedSums) -> dict[str, Any]:
        """The statistics by argument, from sums that other metrics read too."""
        held = {name: shared.of(accumulator) for name, accumulator in self.accumulators.items()}
        return _by_reader({name: self._adapted(name, value, shared.without) for name, value in held.items()})

    def by_group(self, groups: int) -> dict[str, Any]:
        if self.single:
            return {name: [self._adapted(name, a.value)] * groups for name, a in self.accumulators.items()}
        return {
            name: [None if p is None else adapt(p, self.resolved[name][1].statistic) for p in a.parts]
            for name, a in self.accumulators.items()
        }

    def _adapted(self, name: str, value: Any, group: int | None = None) -> Any:
        layer, need = self.resolved[name]
        if value is None:
            raise ValueError(_no_rows_message(self.metric, layer, need, group))
        return adapt(value, need.statistic)


def _by_reader(statistics: dict[str, Any]) -> dict[str, Any]:
    """Gathers the statistics of several readers, ``x/0``, ``x/1``, in one list ``x``."""
    found: dict[str, Any] = {}
    for name, value in statistics.items():
        argument, slash, _ = name.rpartition("/")
        if slash:
            found.setdefault(argument, []).append(value)
        else:
            found[name] = value
    return found


def _no_rows_message(metric: Metric, layer: Layer, need: Need, without: int | None) -> str:
    if "grad" in need.port:
        return no_gradient(metric.names[0], layer, "the loss does not depend on it")
    rest = "" if without is None else f" outside group {without}"
    return f"{metric.names[0]}: no rows were seen at layer {layer.title!r}{rest}: the data are empty, or the layer did not run"
