"""The values of metrics from complete sums: over all samples, and without each group of samples, for the jackknife."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from nodelens.metrics import Metric, Need
from nodelens.statistics import Accumulator, kernels

from .layout import Place
from .metric_sums import MetricSums, SampleCounts, SharedSums, Sums
from .plan import Plan
from .wide_sites import KnownUnits, known_units, reason_left_out

FEW_BYTES = 1 << 22  # of sums: of fewer, threads take longer to start and to wait for each other than they save


@dataclass
class Estimator:
    """A metric at one place: its value, and its value without each group of samples."""

    sums: MetricSums
    counted: Tensor  # (groups,) int64, how many samples of each group have rows
    values: dict[int | None, Tensor] = field(default_factory=dict)  # by the group that is left out; None for the whole
    counts: dict[str, int] = field(default_factory=dict)
    beside: dict[str, Tensor] = field(default_factory=dict)  # further columns, by suffix
    reason: str | None = None  # why there is no value; "" if there is one, None before it is known

    @property
    def metric(self) -> Metric:
        return self.sums.metric

    @cached_property
    def known(self) -> KnownUnits:
        return known_units(self.sums.plan, self.sums.place[0], self.sums.resolved)

    @property
    def errors(self) -> bool:
        """Whether the metric has standard errors."""
        of_pairs = self.metric.shape == "pair" and not self.metric.matrix_errors
        return bool(self.sums.resolved) and not of_pairs and not self.metric.grouped

    @cached_property
    def groups(self) -> list[int]:
        """The groups of samples to be left out in turn."""
        present = self.counted.nonzero().flatten().tolist()
        return present if self.errors and not self.sums.single and len(present) > 1 else []

    @property
    def replicates(self) -> Tensor | None:
        """The values without each group, (groups, ...); None without standard errors."""
        return torch.stack([self.values[g] for g in self.groups]) if self.groups else None

    def reads(self) -> Iterator[tuple]:
        """What is read of ``SharedSums``, as keys for ``release``."""
        yield self.sums.place[0].name, self.metric.parameter
        yield from ((id(accumulator),) for accumulator in self.sums.accumulators.values())

    def weight(self, shared: SharedSums) -> Any:
        weight = shared.weight(self.sums.place[0], self.metric)
        if not isinstance(weight, Tensor):
            return weight
        return self.known.weight(weight, self._reads_no_input)

    @cached_property
    def _reads_no_input(self) -> bool:
        return all(need.port != "input" for _, need in self.sums.resolved.values())

    def evaluate(self, shared: SharedSums, samples: SampleCounts) -> None:
        """Evaluates the metric without the group that the sums leave out, or over all samples."""
        if not (shared.without is None or shared.without in self.groups):
            return
        if self.reason is None:
            self.reason = self._why_none(shared)
        if self.reason:
            return
        weight = self.weight(shared)
        if self.metric.grouped:
            present = self.counted.nonzero().flatten().tolist()
            by_group = self.sums.by_group(len(self.counted))
            self.values[None] = self.metric(weight, **{name: [each[g] for g in present] for name, each in by_group.items()})
            return
        statistics = self.sums.read(shared)
        self.values[shared.without] = self.metric(weight, **statistics)
        if shared.without is None:
            self.beside = self.metric.beside(weight, **statistics)
            self.counts = self.metric.counts(weight, **statistics) | self.sums.without_target(samples)

    def at(self, value: Tensor, places: Tensor, width: int) -> Tensor:
        """Values gathered at an index (units, places) of a layer of this width; NaN for units that were not sampled."""
        if self.known.units is not None:
            value = value.new_full((*value.shape[:-1], width), math.nan).index_copy(-1, self.known.units, value)
        return value[..., places]

    def for_null(self) -> tuple[Any, dict[str, Need], dict[str, Any]]:
        """Weight, needs and statistics over all samples, for the permutation test."""
        shared = SharedSums(self.sums.plan)
        return self.weight(shared), {name: need for name, (_, need) in self.sums.resolved.items()}, self.sums.read(shared)

    def _why_none(self, shared: SharedSums) -> str:
        metric, plan, place = self.metric, self.sums.plan, self.sums.place
        if metric.needs() and not self.sums.resolved:
            wanted = plan.wanted(metric, place)
            left_out = plan.unread(wanted) or plan.unpaired(wanted) or reason_left_out(plan, wanted)
            return left_out or "there is no next layer"
        if metric.weighted and shared.weight(place[0], metric) is None:
            return "no batch norm follows the layer"
        return ""


def estimators_at(metric: Metric, plan: Plan, places: Sequence[Place], sums: Sums, samples: SampleCounts) -> list[Estimator]:
    """The estimators of a metric at places whose values are combined: groups of samples count where all places have rows."""
    read = [MetricSums.at(metric, plan, place, sums) for place in places]
    counted = torch.stack([one.samples(samples) for one in read]).amin(0)
    return [Estimator(one, counted) for one in read]


def evaluate(plan: Plan, estimators: Sequence[Estimator], samples: SampleCounts) -> None:
    """Evaluates metrics over all samples, and without each group.

    Estimators in an order that keeps those of one layer together: sums are formed once for all of them, and dropped after the last
    one. Estimators that share sums or weights are a part, and a part over all samples or without a group is a task. Tasks run in
    parallel threads; those of a sharded model one after another, since its weights are gathered in the same order by every process.
    Metrics of weights alone come first.
    """
    values: dict[tuple[str, str], dict] = {}  # of the weights, which are the same without any group
    of_weights = _parts([each for each in estimators if not each.sums.accumulators])
    of_sums = _parts([each for each in estimators if each.sums.accumulators])
    read = {id(a): a for estimator in estimators for a in estimator.sums.accumulators.values()}
    few = sum(a.nbytes for a in read.values() if isinstance(a, Accumulator)) < FEW_BYTES
    groups = sorted({group for estimator in estimators for group in estimator.groups})
    tasks = [(part, group) for part in sorted(of_sums, key=_nbytes, reverse=True) for group in (None, *groups)]

    @torch.no_grad()
    def without(task: tuple[list[Estimator], int | None]) -> None:
        shared = SharedSums(plan, task[1], values)
        with kernels.using(plan.kernels):
            for estimator, unread in _with_last_reads(task[0]):
                estimator.evaluate(shared, samples)
                shared.release(unread)

    for part in of_weights:
        without((part, None))  # by all threads at once: what a thread of its own frees stays with the process
    _in_threads(without, tasks, 1 if few or plan.sharded else torch.get_num_threads())


def _parts(estimators: Sequence[Estimator]) -> list[list[Estimator]]:
    """The estimators in runs, of which no two read the same sums or weights."""
    last = {key: k for k, estimator in enumerate(estimators) for key in estimator.reads()}
    parts: list[list[Estimator]] = []
    end = -1  # of the run
    for k, estimator in enumerate(estimators):
        if k > end:
            parts.append([])
        parts[-1].append(estimator)
        end = max([end, *(last[key] for key in estimator.reads())])
    return parts


def _nbytes(part: Sequence[Estimator]) -> int:
    """Bytes of the sums that a part reads."""
    read = {id(a): a for estimator in part for a in estimator.sums.accumulators.values()}
    return sum(a.nbytes for a in read.values() if isinstance(a, Accumulator))


def _with_last_reads(estimators: Sequence[Estimator]) -> list[tuple[Estimator, list[tuple]]]:
    """Estimators, each with the keys of what none after it reads."""
    last = {key: k for k, estimator in enumerate(estimators) for key in estimator.reads()}
    unread: dict[int, list[tuple]] = {}
    for key, k in last.items():
        unread.setdefault(k, []).append(key)
    return [(estimator, unread.get(k, [])) for k, estimator in enumerate(estimators)]


def _in_threads(function: Callable[[Any], None], items: Sequence[Any], threads: int) -> None:
    """Calls a function on each item, in some threads, each of which then computes on its own.

    Items are given the largest first. One thread takes them from the end: two that run many short operations wait for each other.
    """
    if min(threads, len(items)) < 2:
        for item in items:
            function(item)
        return
    left = deque(items)

    def work(take: Callable[[], Any]) -> None:
        while True:
            try:
                item = take()
            except IndexError:
                return
            try:
                function(item)
            except BaseException:
                left.clear()  # the other threads end
                raise

    try:
        with (
            threadpool_limits(1, user_api="blas"),  # of numpy; that of torch follows the number of its threads
            ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            for done in [pool.submit(work, left.pop), *(pool.submit(work, left.popleft) for _ in range(threads - 1))]:
                done.result()
    finally:
        torch.set_num_threads(threads)  # new threads take over the number that was set last
