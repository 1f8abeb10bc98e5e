"""The plan of a pass: which statistic is kept at which site, what it will take, and whether that is allowed."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from nodelens.metrics import Metric, Need
from nodelens.metrics.need import Other, Target
from nodelens.network.hooks import Site
from nodelens.network.layers import Layer, pairs_of
from nodelens.network.targets import check_token_target, is_per_token, resolve_auto
from nodelens.statistics.costs import PAIRS, SAMPLED, SQUARE, numbers, supersets_of
from nodelens.statistics.weight_sums import WeightSums

from .covariance import KINDS, CovariancePolicy, check_width, narrowed, whole
from .dry_run import DryRun, Seen
from .validation import check_bytes, check_parameter
from .waiting import company_bytes, held, held_bytes

GROUPED_WIDTH = 1024  # wider pair statistics are kept once, not once a group: they have no standard error
BALANCE = 32.0  # float32 operations in the time of one byte of rows, found with ResNet-18 at 32, 64 and 224 pixels
_SITES = ("next", "input")  # targets that are rows of another site
Place = tuple[Layer, Layer | None]  # where a metric is taken: a layer, and for some the one behind it


@dataclass(frozen=True)
class Plan:
    """Every statistic once, however many metrics ask for it.

    ``needs`` holds, for each layer, what is added up there; ``lookup`` says which of those supersets_of a metric's need.
    """

    layers: list[Layer]
    metrics: Mapping[str, Metric]
    dry_run: DryRun
    groups: int = 8
    positions: int | None = None  # a sample of positions an image for pair statistics; None for all
    never_called: list[str] = field(default_factory=list)
    precision: str = "float32"  # of products; rows that are float64 keep it
    per_token: frozenset[str] = frozenset({"label", "given"})  # which the data have one of a token, where each token has logits
    pairs: list[tuple[Layer, Layer]] = field(default_factory=list)  # of layers that edge metrics compare
    covariance: CovariancePolicy = field(default_factory=CovariancePolicy)  # what becomes of products of units at wide sites
    part: frozenset[str] | None = None  # the layers measured in this pass of several; None for all

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layers: list[Layer],
        metrics: Mapping[str, Metric],
        dry_run: DryRun,
        groups: int = 8,
        positions: int | None = None,
        optional: bool = False,
        precision: str = "float32",
        pairs: str | Sequence[Sequence[str]] = "consecutive",
        per_token: Iterable[str] = ("label", "given"),
        covariance: CovariancePolicy | None = None,
    ) -> "Plan":
        """A plan for a model's layers, after one recorded forward of a few samples.

        ``optional`` leaves out layers that the forward never calls (and says so); otherwise such a layer is an error, and
        so is a metric that needs weights at a layer without. ``pairs`` of layers for edges: consecutive, all, or names.
        ``per_token``: which of label and given the data have one of a token, where each token has logits of its own.
        """
        if precision not in ("float32", "float64"):
            raise ValueError(f"precision is {precision!r}; products are formed in float32 or float64")
        silent = [layer for layer in layers if f"{layer.name}.output" not in dry_run.seen]
        if silent and (not optional or len(silent) == len(layers)):
            raise ValueError(
                f"layer {silent[0].name!r} is never called by {type(model).__name__}.forward (its parent may read "
                "its weight directly): name another layer, such as the module that takes its output"
            )
        layers = [layer for layer in layers if layer not in silent]
        beside = frozenset(per_token), pairs_of(layers, pairs), covariance or CovariancePolicy()
        never = [layer.name for layer in silent]
        plan = cls(layers, metrics, dry_run, groups, positions, never, precision, *beside)
        for name, metric in metrics.items():
            check_parameter(plan, name, metric, optional)
            for need in metric.needs().values() if dry_run.tokens else ():
                check_token_target(name, need.target, dry_run.classes, plan.per_token)  # type: ignore[arg-type]
        check_width(plan)
        return plan

    def seen(self, layer: Layer, port: str) -> Seen:
        return self.seen_at(layer.name, port)

    def seen_at(self, name: str, port: str) -> Seen:
        """What was recorded at a layer's port, or the narrower rows that its suffix stands for."""
        found = self.dry_run.seen[f"{name}.{'input' if whole(port) == 'input' else 'output'}"]
        return replace(found, width=self.covariance.count) if port.endswith(KINDS) else found

    @property
    def measured(self) -> list[Layer]:
        """The layers that have a row in the table of this pass."""
        return [layer for layer in self.layers if self.part is None or layer.name in self.part]

    def stored(self, layer: Layer, metric: Metric) -> Tensor | None:
        """What a metric reads of a layer beside sums, where it lies; None where the layer has none."""
        if metric.parameter == "norm":
            norm = self.dry_run.norms.get(layer.name)
            return getattr(norm.module, "weight", None) if norm else None
        return getattr(layer, metric.parameter)

    def parameter(self, layer: Layer, metric: Metric) -> Tensor | None:
        """The same on the CPU."""
        found = self.stored(layer, metric)
        return None if found is None else found.detach().cpu()

    def places(self, metric: Metric) -> list[Place]:
        """Where a metric is taken: layers, the pairs of an edge metric, or layers with the next one."""
        if metric.kind == "edge":
            return [pair for pair in self.pairs if self.part is None or pair[0].name in self.part]
        if any(need.port == "next" or need.target == "next" for need in metric.needs().values()):
            return [(layer, self.next.get(layer)) for layer in self.measured]
        return [(layer, None) for layer in self.measured]

    @cached_property
    def next(self) -> dict[Layer, Layer]:
        """The layer behind each but the last."""
        return dict(itertools.pairwise(self.layers))

    def resolve(self, metric: Metric, place: Place) -> dict[str, tuple[Layer, Need]]:
        """What a metric needs at a place: for each argument the layer where it is added up, and the need there.

        Empty where it needs a next layer and there is none, and where ``wide`` leaves it out.
        """
        return narrowed(self, place[0], self.wanted(metric, place))

    def wanted(self, metric: Metric, place: Place) -> dict[str, tuple[Layer, Need]]:
        """What a metric needs at a place, however wide the sites are.

        Sites whose rows stand beside each other but lie at different positions are compared by samples, and so is all that the
        metric (or the part of a composite) needs.
        """
        layer, other = place
        needs = metric.needs()
        if other is None and any(need.port == "next" or need.target == "next" for need in needs.values()):
            return {}
        part = {name: name.rpartition(".")[0] for name in needs}  # of a composite
        apart = {part[name] for name, need in needs.items() if self._apart(need, layer, other)}
        tokens: dict[str, Any] = {n: need.target for n, need in needs.items() if need.target not in _SITES}
        tokens = tokens if self.dry_run.tokens else {}
        beside = {part[n]: resolve_auto(target, True) for n, target in tokens.items() if is_per_token(target, self.per_token)}
        return {n: self._resolved(need, layer, other, part[n] in apart, beside.get(part[n])) for n, need in needs.items()}

    def _resolved(
        self, need: Need, layer: Layer, other: Layer | None, apart: bool, beside: Target | None = None
    ) -> tuple[Layer, Need]:
        """What a need is here; ``beside``: the target of the metric's tokens, whose rows are those that have it."""
        owner = other if need.port == "next" and other is not None else layer
        view = need.view
        if view == "whole":
            view = "positions" if self.dry_run.tokens else "samples"
        if apart and view == "positions":
            view = "samples"
        target = need.target
        if target in _SITES:
            target = Other(other.name, "output") if target == "next" and other is not None else Other(layer.name, "input")
        elif beside is not None:
            view, target = "tokens", beside
        elif target is not None:
            target = resolve_auto(target, tokens=False)  # type: ignore[arg-type]
        port = "output" if need.port in ("next", "projection") else need.port
        return owner, self._one_view(owner, Need(need.statistic, port, view, target))

    def _apart(self, need: Need, layer: Layer, other: Layer | None) -> bool:
        if need.target not in _SITES:
            return False
        here = self.seen(other if need.port == "next" and other is not None else layer, need.port)
        there = self.seen(other, "output") if need.target == "next" and other is not None else self.seen(layer, "input")
        alone = any(seen.calls > 1 or seen.packed for seen in (here, there))
        return alone or (here.grid, here.positions) != (there.grid, there.positions)

    @cached_property
    def _wanted(self) -> dict[str, set[Need]]:
        wanted: dict[str, set[Need]] = {layer.name: set() for layer in self.layers}
        for metric in self.metrics.values():
            for place in self.places(metric):
                for owner, need in self.resolve(metric, place).values():
                    wanted[owner.name].add(need)
        return wanted

    def needs(self, layer: Layer) -> list[Need]:
        """What is added up at a layer: moments of rows whose products are kept are read off those."""
        wanted = self._wanted[layer.name]
        return sorted((need for need in wanted if self._provider(layer, need, wanted) == need), key=str)

    def lookup(self, layer: Layer, need: Need) -> Need:
        """The need that supersets_of another."""
        return self._provider(layer, need, self._wanted[layer.name])

    def sites(self) -> list[Site]:
        """Every site that is read, each layer's own and those whose rows stand beside others'."""
        ports: dict[str, set[str]] = {layer.name: {need.port for need in self.needs(layer)} for layer in self.layers}
        for other in self.others:
            ports[other.layer].add(other.port)
        return [Site(layer, port) for layer in self.layers for port in sorted(ports[layer.name])]

    @cached_property
    def others(self) -> set[Other]:
        """Sites whose rows stand beside those of another."""
        return {need.target for layer in self.layers for need in self.needs(layer) if isinstance(need.target, Other)}

    @property
    def overwritten(self) -> set[str]:
        return {layer.name for layer in self.layers if self.seen(layer, "output").overwritten}

    @property
    def targets(self) -> set:
        """What is made of logits and labels for each sample."""
        every = {need.target for layer in self.layers for need in self.needs(layer) if need.target and need.view != "tokens"}
        return {target for target in every if not isinstance(target, Other)}

    @property
    def gradients(self) -> bool:
        return any("grad" in site.port for site in self.sites())

    def sampled(self, need: Need) -> bool:
        """Whether a need reads a sample of the positions only."""
        reads = need.view == "tokens" or (need.statistic in SAMPLED and need.view == "positions")
        return self.positions is not None and reads

    def groups_of(self, layer: Layer, need: Need) -> int:
        wide = need.statistic in SQUARE and max(self._widths(layer, need)) > GROUPED_WIDTH
        return 1 if wide else self.groups

    def _widths(self, layer: Layer, need: Need) -> tuple[int, int]:
        """Units at a need's port, and columns of what stands beside them."""
        width = self.seen(layer, need.port).width
        if layer.geometry is not None and need.statistic.entries:
            width *= math.prod(layer.geometry.kernel)
        if isinstance(need.target, Other):
            return width, self.seen_at(*need.target).width
        if need.statistic is WeightSums:
            return width, self.seen(layer, "input").width if layer.weight is None else layer.weight.shape[1]
        parts = need.target.split("+") if isinstance(need.target, str) else [""] if need.target else []
        return width, sum(self.dry_run.classes if part == "logits" else 1 for part in parts)

    def nbytes(self, layer: Layer, need: Need) -> int:
        """Bytes of a statistic's sums over all its groups."""
        width, beside = self._widths(layer, need)
        repeats = getattr(layer.module, "groups", 1)
        return 8 * self.groups_of(layer, need) * numbers(need.statistic, width, beside, self.dry_run.classes, repeats)

    def overhead(self) -> float:
        """Estimated cost of the pass over a bare forward (with its backward, where gradients are taken), as a share."""
        extra = 0.0
        for layer in self.layers:
            for need in self.needs(layer):
                seen = self.seen(layer, need.port)
                rows = self._rows_a_sample(layer, need)
                width, beside = self._widths(layer, need)
                beside = beside if isinstance(need.target, Other) else width
                products = 2 * width * beside * rows if need.statistic in PAIRS else 0
                extra += products + BALANCE * seen.nbytes * rows / seen.positions
        return extra / max(1, self.dry_run.flops * (3 if self.gradients else 1))

    @property
    def total_bytes(self) -> int:
        sums = sum(self.nbytes(layer, need) for layer in self.layers for need in self.needs(layer))
        return sums + self.waiting_bytes + self.held_bytes

    @property
    def waiting_bytes(self) -> int:
        """Rows that wait for company, at most."""
        return sum(company_bytes(self, site) for site in self.sites())

    @property
    def held_bytes(self) -> int:
        """Rows that wait for those of another site, or for the logits, of one batch."""
        return sum(held_bytes(self, site) for site in held(self))

    def meets(self, need: Need) -> bool:
        """Whether a need's rows wait for those of another site, or for the logits."""
        return need.view == "tokens" or (isinstance(need.target, Other) and need.view == "positions")

    def check(self, budget: float | None) -> None:
        """Raises MemoryError, with the ways out, where the plan takes more bytes than the budget."""
        check_bytes(self, budget)

    def rows(self) -> list[dict]:
        """The plan as a table: a row a statistic of a layer."""
        return [
            {
                "layer": layer.name,
                "statistic": str(need),
                "width": self.seen(layer, need.port).width,
                "rows_per_sample": self._rows_a_sample(layer, need),
                "groups": self.groups_of(layer, need),
                "bytes": self.nbytes(layer, need),
                "waits_for": str(getattr(need.target, "__name__", need.target)) if self.meets(need) else None,
            }
            for layer in self.layers
            for need in self.needs(layer)
        ]

    def _rows_a_sample(self, layer: Layer, need: Need) -> int:
        positions = self.seen(layer, need.port).positions
        if need.view == "samples":
            return 1
        return min(positions, self.positions or positions) if self.sampled(need) else positions

    def _one_view(self, layer: Layer, need: Need) -> Need:
        """A row a sample is the same in either view."""
        seen = self.seen(layer, need.port)
        return need._replace(view="samples") if seen.flat and seen.calls == 1 and need.view != "tokens" else need

    def _provider(self, layer: Layer, need: Need, wanted: set[Need]) -> Need:
        """What a need is read off: a statistic that holds more, of the same rows in the same groups."""
        for statistic in supersets_of(need.statistic):
            richer = need._replace(statistic=statistic)
            alike = self.sampled(richer) == self.sampled(need) and self.groups_of(layer, richer) == self.groups_of(layer, need)
            if richer in wanted and alike:
                return self._provider(layer, richer, wanted)  # which may itself be read off one that is richer still
        return need
