"""The layout of a pass: which layers and groups are measured, and which statistics the metrics need there."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from nodelens.metrics import Metric, Need
from nodelens.metrics.need import Other, Target, Units
from nodelens.network.experts import ExpertLayer
from nodelens.network.group_layer import GroupLayer
from nodelens.network.layers import ASSOCIATION, Layer
from nodelens.network.sharded import full
from nodelens.network.targets import is_per_token, resolve_auto
from nodelens.network.tasks import BY_VALUE
from nodelens.statistics.costs import SAMPLED, SQUARE, numbers, supersets_of
from nodelens.statistics.weight_sums import WeightSums

from .association_methods import settled
from .covariance import KINDS, CovariancePolicy, base_port
from .dry_run import DryRun, Seen
from .firing import BEHIND
from .members import Members, of_groups_only, side_of

GROUPED_WIDTH = 1024  # wider pair statistics are not kept per group of samples, so they have no standard error
_SITES = ("next", "input")  # targets that are rows of another site
Reduce = Literal["sum", "mean", "max", "prod", "first"]
REDUCTIONS: dict[Reduce, Callable[[Tensor], Tensor]] = {  # over the last axis
    "sum": lambda x: x.sum(-1),
    "mean": lambda x: x.mean(-1),
    "max": lambda x: x.amax(-1),
    "prod": lambda x: x.prod(-1),
    "first": lambda x: x[..., 0],
}
Place = tuple[Layer, Layer | None]  # a layer where a metric is evaluated, and the next layer for some


@dataclass(frozen=True)
class PassLayout:
    """Which statistics are computed where. A statistic that several metrics need is computed once.

    ``needs`` lists the statistics of a layer; ``lookup`` returns the one that provides what a metric needs.
    """

    layers: list[Layer]  # layers and pruning groups with one table row per unit
    metrics: Mapping[str, Metric]
    dry_run: DryRun
    groups: int = 8
    positions: int | None = None  # positions drawn per image for pair statistics; None for all
    never_called: list[str] = field(default_factory=list)
    precision: str = "float32"  # of products; float64 rows keep theirs
    per_token: frozenset[str] = frozenset({"label", "given"})  # targets with one value per token, if each token has logits
    pairs: list[tuple[Layer, Layer]] = field(default_factory=list)  # layer pairs that edge metrics compare
    covariance: CovariancePolicy = field(default_factory=CovariancePolicy)  # at wide sites
    part: frozenset[str] | None = None  # names measured in this pass of several; None for all
    members: Members = field(default_factory=Members)  # the layers where units of pruning groups are captured
    seed: int = 0
    reduce: Reduce = "sum"  # combines a unit's values at several places
    cuts: Tensor | None = None  # of sample hashes, between groups of equal size
    hashes: Mapping[int, Tensor] = field(default_factory=dict)  # of samples of batches in memory, by the id of the batch
    notes: tuple[str, ...] = ()  # what is left out although nobody chose so
    optional: bool = False  # whether a layer that cannot be read has NaN instead of stopping the pass
    no_gradient: Mapping[str, str] = field(default_factory=dict)  # why no gradient reached a layer, by name
    stack: Layer | None = None  # all layers side by side, where a metric asks for one matrix of them
    no_derivative: Mapping[tuple[str, Need], str] = field(default_factory=dict)  # why a derivative does not exist, by layer
    sharded: bool = False  # whether the model's parameters are distributed over processes
    kernels: str = "torch"  # what forms sums over positions: torch or compiled

    def seen(self, layer: Layer, port: str) -> Seen:
        return self.seen_at(layer.name, port)

    def seen_at(self, name: str, port: str) -> Seen:
        """What the dry run saw at a port; the sampled or sketched width if the port's suffix says so."""
        kept = f"{name}.{'input' if base_port(port) == 'input' else 'output'}"
        found = self.dry_run.seen[f"{name}.{BEHIND}" if port == BEHIND else kept]
        return replace(found, width=self.covariance.count) if port.endswith(KINDS) else found

    @cached_property
    def every_layer(self) -> list[Layer]:
        """The measured layers, the layers that capture units of groups, and the model if sums over the whole model are needed."""
        return [*self.layers, *self.members.layers, *([] if self.stack is None else [self.stack])]

    @cached_property
    def measured(self) -> list[Layer]:
        """The layers that have rows in the table of this pass."""
        return [layer for layer in self.layers if self.part is None or layer.name in self.part]

    def stored(self, layer: Layer, metric: Metric) -> Any:
        """The tensor or group that a metric reads besides its sums, on its own device; None if the layer has none."""
        if metric.parameter == "group":
            return layer if isinstance(layer, GroupLayer) else self.members.around[layer.name]
        if metric.parameter == "units":
            return Units(layer.title, self.seen(layer, "output").width, self.seed)
        if metric.parameter == "norm" and not isinstance(layer, GroupLayer):
            scale = getattr(self.dry_run.norm_modules.get(layer.name), "weight", None)
            return None if scale is None else full(scale)
        return getattr(layer, metric.parameter)

    def lacks(self, layer: Layer, metric: Metric) -> bool:
        """Whether a layer has nothing that the metric could read besides its sums."""
        if isinstance(layer, GroupLayer) and metric.parameter in ("weight", "norm"):
            return not layer.has(metric.parameter)  # without gathering the weights
        if metric.parameter in ("weight", "tensor", "change"):
            return layer.shape is None or (metric.parameter == "change" and layer.start is None)
        return self.stored(layer, metric) is None

    def parameter(self, layer: Layer, metric: Metric) -> Any:
        """The same on the CPU."""
        found = self.stored(layer, metric)
        return found.detach().cpu() if isinstance(found, Tensor) else found

    def places(self, metric: Metric) -> list[Place]:
        """Where a metric is evaluated: layer pairs for an edge metric, otherwise layers, some with the next layer."""
        if metric.kind == "edge":
            return [pair for pair in self.pairs if self.part is None or pair[0].name in self.part]
        found = dict.fromkeys(part for layer in self.measured for part in self.parts(metric, layer))
        places: list[Place] = [(layer, self.behind(metric, layer)) for layer in found]
        return [*places, (self.stack, None)] if self.stacks(metric) else places  # type: ignore[list-item]

    def stacks(self, metric: Metric) -> bool:
        """Whether this pass has a matrix of all layers of a metric."""
        return self.stack is not None and self.part is None and bool(metric.options.get("stacked"))

    def parts(self, metric: Metric, layer: Layer) -> list[Layer]:
        """The layers that a metric's value is combined from: the layer itself, or those that capture a group's units."""
        if not isinstance(layer, GroupLayer):
            return [self.members.around[layer.name] if of_groups_only(metric) else layer]
        side = side_of(metric)
        return [layer] if side == "group" else [each for each, _ in self.members.of(layer, side)]

    def behind(self, metric: Metric, layer: Layer) -> Layer | None:
        """The next layer if the metric reads it, else None."""
        reads = any(need.port == "next" or need.target == "next" for need in metric.needs().values())
        return self.next.get(layer) if reads else None

    @cached_property
    def next(self) -> dict[Layer, Layer]:
        """The successor of each layer but the last."""
        return dict(itertools.pairwise(self.members.chain or self.layers))

    def resolve(self, metric: Metric, place: Place) -> dict[str, tuple[Layer, Need]]:
        """What a metric needs at a place. ``Plan`` replaces needs at sites that are too wide."""
        return self.wanted(metric, place)

    def wanted(self, metric: Metric, place: Place) -> dict[str, tuple[Layer, Need]]:
        """What a metric needs at a place, whatever the width of the sites.

        All sums of a metric (or of the same part of a composite) cover the same rows: where paired sites differ in positions, those
        of whole samples; where there is a target, those that have one.
        """
        layer, other = place
        if layer is self.stack:
            return {name: self._resolve_need(need, layer) for name, need in metric.stacked_needs().items()}
        needs = metric.needs()
        if other is None and any(need.port == "next" or need.target == "next" for need in needs.values()):
            return {}
        part = {name: name.rpartition(".")[0] for name in needs}  # name of the part of a composite
        unpaired = {part[name] for name, need in needs.items() if self._differs_in_positions(need, layer, other)}
        tokens: dict[str, Any] = {n: need.target for n, need in needs.items() if need.target not in _SITES}
        tokens = tokens if self.dry_run.tokens else {}
        by_token = {part[n]: resolve_auto(target, True) for n, target in tokens.items() if is_per_token(target, self.per_token)}
        found = {n: self._resolved(need, layer, other, part[n] in unpaired, by_token.get(part[n])) for n, need in needs.items()}
        return self._at_members({n: (owner, _selected(need, needs, part, n)) for n, (owner, need) in found.items()})

    def _resolved(
        self, need: Need, layer: Layer, other: Layer | None, by_samples: bool, token_target: Target | None = None
    ) -> tuple[Layer, Need]:
        """A need as it is computed at this place. ``token_target``: the target that selects the tokens."""
        owner = other if need.port == "next" and other is not None else layer
        view = need.view
        if view == "whole":
            view = "positions" if self.dry_run.tokens else "samples"
        if by_samples and view == "positions":
            view = "samples"
        target = need.target
        if target in _SITES:
            target = Other(other.name, "output") if target == "next" and other is not None else Other(layer.name, "input")
        elif token_target is not None:
            view, target = "tokens", token_target
        elif target is not None:
            target = resolve_auto(target, tokens=False, classes=self.dry_run.task not in BY_VALUE)  # type: ignore[arg-type]
        is_output = need.port in ("next", "projection") or (need.port == BEHIND and owner.name not in self.dry_run.firing)
        port = "output" if is_output else need.port
        if port == ASSOCIATION:
            return self._resolve_need(need, owner)
        return owner, self._merge_views(owner, need._replace(port=port, view=view, target=target))

    def _resolve_need(self, need: Need, layer: Layer) -> tuple[Layer, Need]:
        """A need of derivatives with the method that is used at a layer."""
        return layer, need._replace(options=(settled(need.options[0], layer, self),))

    def _at_members(self, needs: dict[str, tuple[Layer, Need]]) -> dict[str, tuple[Layer, Need]]:
        """Moves needs of groups to where they are computed: ``consumed`` to each reader, ``model`` to the model."""
        found: dict[str, tuple[Layer, Need]] = {}
        for name, (owner, need) in needs.items():
            if need.port == "model" and self.members.model is not None:
                found[name] = self.members.model, need
            elif need.port == "consumed":
                for k, (reader, _) in enumerate(self.members.readers[owner.name]):
                    routed = isinstance(reader, ExpertLayer)  # computed at the group, where every token counts
                    found[f"{name}/{k}"] = (
                        (owner, need) if routed else (reader, self._merge_views(reader, need._replace(port="output")))
                    )
            else:
                found[name] = owner, need
        return found

    def _differs_in_positions(self, need: Need, layer: Layer, other: Layer | None) -> bool:
        if need.target not in _SITES:
            return False
        here = self.seen(other if need.port == "next" and other is not None else layer, need.port)
        there = self.seen(other, "output") if need.target == "next" and other is not None else self.seen(layer, "input")
        alone = any(seen.calls > 1 or seen.packed for seen in (here, there))
        return alone or (here.grid, here.positions) != (there.grid, there.positions)

    @cached_property
    def _wanted(self) -> dict[str, set[Need]]:
        wanted: dict[str, set[Need]] = {layer.name: set() for layer in self.every_layer}
        for metric in self.metrics.values():
            for place in self.places(metric):
                for owner, need in self.resolve(metric, place).values():
                    wanted[owner.name].add(need)
        return wanted

    def needs(self, layer: Layer) -> list[Need]:
        """The statistics computed at a layer, without those that can be derived from another one."""
        if layer.name not in self._needs:
            wanted = self._wanted[layer.name]
            self._needs[layer.name] = sorted((need for need in wanted if self._provider(layer, need, wanted) == need), key=str)
        return self._needs[layer.name]

    @cached_property
    def _needs(self) -> dict[str, list[Need]]:
        """The needs of the layers that were asked for."""
        return {}

    @cached_property
    def read(self) -> list[Layer]:
        """The layers of which this pass computes statistics."""
        return [layer for layer in self.every_layer if self._wanted[layer.name]]

    def lookup(self, layer: Layer, need: Need) -> Need:
        """The need whose statistic provides this one."""
        return self._provider(layer, need, self._wanted[layer.name])

    def is_held(self, need: Need) -> bool:
        """Whether rows are held within a batch, until the paired site or the logits are known."""
        return need.view == "tokens" or (isinstance(need.target, Other) and need.view == "positions")

    def sampled(self, need: Need) -> bool:
        """Whether a need reads only a sample of the positions."""
        reads = need.view == "tokens" or (need.statistic in SAMPLED and need.view == "positions")
        return self.positions is not None and reads

    def groups_of(self, layer: Layer, need: Need) -> int:
        if need.port == "model":
            return 1
        wide = need.statistic in SQUARE and max(self.widths(layer, need)) > GROUPED_WIDTH
        return 1 if wide else self.groups

    def widths(self, layer: Layer, need: Need) -> tuple[int, int]:
        """Units at a need's port, and columns of its paired target."""
        width = self.seen(layer, need.port).width
        if layer.geometry is not None and need.statistic.entries:
            width *= math.prod(layer.geometry.kernel)
        if isinstance(need.target, Other):
            return width, self.seen_at(*need.target).width
        if need.statistic is WeightSums:
            return width, self.seen(layer, "input").width if layer.shape is None else layer.shape[1]
        if not need.statistic.paired():
            return width, 0
        parts = need.target.split("+") if isinstance(need.target, str) else [""] if need.target else []
        return width, sum(self.dry_run.classes if part == "logits" else 1 for part in parts)

    def nbytes(self, layer: Layer, need: Need) -> int:
        """Bytes of a statistic's sums over all groups of samples."""
        if need.port == "model":
            return need.statistic.size_of(self.members.groups, *need.options)  # type: ignore[attr-defined]
        width, columns = self.widths(layer, need)
        repeats = getattr(layer.module, "groups", 1)
        positions = self.seen(layer, need.port).positions
        folds = need.options[0].folds if need.port.startswith(ASSOCIATION) else 1
        count = folds * numbers(need.statistic, width, columns, self.dry_run.classes, repeats, positions)
        return 8 * self.groups_of(layer, need) * (count - folds + 1)

    def rows_per_sample(self, layer: Layer, need: Need) -> int:
        """Rows that a need reads of one sample, at most: one per position, or those that are drawn."""
        if need.view == "samples" or need.port == "model":
            return 1
        positions = self.seen(layer, need.port).positions
        return min(positions, self.positions or positions) if self.sampled(need) else positions

    def _merge_views(self, layer: Layer, need: Need) -> Need:
        """Changes the view to samples if there is one row per sample anyway, so that both views share their sums."""
        seen = self.seen(layer, need.port)
        return need._replace(view="samples") if seen.flat and seen.calls == 1 and need.view != "tokens" else need

    def _provider(self, layer: Layer, need: Need, wanted: set[Need]) -> Need:
        """The need that a need is derived from: a richer statistic of the same rows and groups, or itself."""
        for statistic in supersets_of(need.statistic):
            richer = need._replace(statistic=statistic)
            same_rows = self.sampled(richer) == self.sampled(need) and self.groups_of(layer, richer) == self.groups_of(layer, need)
            if richer in wanted and same_rows:
                return self._provider(layer, richer, wanted)  # which may be derived from a richer one in turn
        return need


def _selected(need: Need, needs: Mapping[str, Need], part: Mapping[str, str], name: str) -> Need:
    """A need as resolved; one per sample without a target gets that of its metric, which selects the samples that have it."""
    of_metric = {other.target for n, other in needs.items() if part[n] == part[name] and other.target not in (None, *_SITES)}
    if need.view != "samples" or need.target is not None or need.port == "model" or len(of_metric) != 1:
        return need
    return need._replace(target=resolve_auto(of_metric.pop(), tokens=False))  # type: ignore[arg-type]
