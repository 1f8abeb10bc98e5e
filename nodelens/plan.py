"""The plan of a pass: which statistic is kept at which site, what it will take, and whether that is allowed."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from .hooks import Site
from .layers import Layer, pairs_of
from .metrics import Metric, Need
from .metrics.base import Other
from .recording import Recording, Seen
from .statistics.costs import PAIRS, SAMPLED, SQUARE, numbers, serves

GROUPED_WIDTH = 1024  # wider pair statistics are kept once, not once a group: they have no standard error
BALANCE = 32.0  # float32 operations in the time of one byte of rows, found with ResNet-18 at 32, 64 and 224 pixels
CAPACITY = {"rows": 4096, "sums": 1024, "samples": 1024, "entries": 128}  # what waits for company: no small product is formed
Place = tuple[Layer, Layer | None]  # where a metric is taken: a layer, and for some the one behind it


@dataclass(frozen=True)
class Plan:
    """Every statistic once, however many metrics ask for it.

    ``needs`` holds, for each layer, what is added up there; ``lookup`` says which of those serves a metric's need.
    """

    layers: list[Layer]
    metrics: Mapping[str, Metric]
    recording: Recording
    groups: int = 8
    positions: int | None = None  # a sample of positions an image for pair statistics; None for all
    never_called: list[str] = field(default_factory=list)
    precision: str = "float32"  # of products; rows that are float64 keep it
    pairs: list[tuple[Layer, Layer]] = field(default_factory=list)  # of layers that edge metrics compare

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layers: list[Layer],
        metrics: Mapping[str, Metric],
        recording: Recording,
        groups: int = 8,
        positions: int | None = None,
        optional: bool = False,
        precision: str = "float32",
        pairs: str | Sequence[Sequence[str]] = "consecutive",
    ) -> "Plan":
        """A plan for a model's layers, after one recorded forward of a few samples.

        ``optional`` leaves out layers that the forward never calls (and says so); otherwise such a layer is an error, and
        so is a metric that needs weights at a layer without. ``pairs`` of layers for edges: consecutive, all, or names.
        """
        if precision not in ("float32", "float64"):
            raise ValueError(f"precision is {precision!r}; products are formed in float32 or float64")
        silent = [layer for layer in layers if f"{layer.name}.output" not in recording.seen]
        if silent and (not optional or len(silent) == len(layers)):
            raise ValueError(
                f"layer {silent[0].name!r} is never called by {type(model).__name__}.forward (its parent may read "
                "its weight directly): name another layer, such as the module that takes its output"
            )
        layers = [layer for layer in layers if layer not in silent]
        plan = cls(
            layers,
            metrics,
            recording,
            groups,
            positions,
            [layer.name for layer in silent],
            precision,
            pairs_of(layers, pairs),
        )
        for name, metric in metrics.items():
            plan._check_parameter(name, metric, optional)
        return plan

    def seen(self, layer: Layer, port: str) -> Seen:
        return self.recording.seen[f"{layer.name}.{'input' if port == 'input' else 'output'}"]

    def parameter(self, layer: Layer, metric: Metric) -> Tensor | None:
        """What a metric reads of a layer beside sums, on the CPU; None where the layer has none."""
        if metric.parameter == "norm":
            norm = self.recording.norms.get(layer.name)
            found = getattr(norm.module, "weight", None) if norm else None
        else:
            found = getattr(layer, metric.parameter)
        return None if found is None else found.detach().cpu()

    def _check_parameter(self, name: str, metric: Metric, optional: bool) -> None:
        if not metric.weighted:
            return
        bare = [layer for layer in self.layers if self.parameter(layer, metric) is None]
        some = optional and metric.parameter == "norm" and len(bare) < len(self.layers)
        if bare and not some:
            where = f"layer {bare[0].name!r} ({type(bare[0].module).__name__})"
            words = {
                "norm": f"reads the scale of a batch norm, and none is behind {where}",
                "change": f"reads the change of the weights, and those of {where} at the start are not known: give "
                "initial_path= (initial= in Python)",
            }
            raise ValueError(
                f"metric {name!r} {words.get(metric.parameter, f'needs weights, {where} has none')}; or leave the metric out, or "
                "the layer (layers=)"
            )

    def places(self, metric: Metric) -> list[Place]:
        """Where a metric is taken: layers, the pairs of an edge metric, or layers with the next one."""
        if metric.kind == "edge":
            return list(self.pairs)
        if any(need.port == "next" or need.target == "next" for need in metric.needs().values()):
            return [(layer, self.next.get(layer)) for layer in self.layers]
        return [(layer, None) for layer in self.layers]

    @cached_property
    def next(self) -> dict[Layer, Layer]:
        """The layer behind each but the last."""
        return dict(itertools.pairwise(self.layers))

    def resolve(self, metric: Metric, place: Place) -> dict[str, tuple[Layer, Need]]:
        """What a metric needs at a place: for each argument the layer where it is added up, and the need there.

        Empty where it needs a next layer and there is none. Sites whose rows stand beside each other but lie at different
        positions are compared by samples, and so is all that the metric (or the part of a composite) needs.
        """
        layer, other = place
        needs = metric.needs()
        if other is None and any(need.port == "next" or need.target == "next" for need in needs.values()):
            return {}
        apart = {name.rpartition(".")[0] for name, need in needs.items() if self._apart(need, layer, other)}
        return {name: self._resolved(need, layer, other, name.rpartition(".")[0] in apart) for name, need in needs.items()}

    def _resolved(self, need: Need, layer: Layer, other: Layer | None, apart: bool) -> tuple[Layer, Need]:
        owner = other if need.port == "next" and other is not None else layer
        view = need.view
        if view == "whole":
            view = "positions" if self.recording.tokens else "samples"
        if apart and view == "positions":
            view = "samples"
        target = need.target
        if target in ("next", "input"):
            target = Other(other.name, "output") if target == "next" and other is not None else Other(layer.name, "input")
        port = "output" if need.port in ("next", "projection") else need.port
        return owner, self._one_view(owner, Need(need.statistic, port, view, target))

    def _apart(self, need: Need, layer: Layer, other: Layer | None) -> bool:
        if need.target not in ("next", "input"):
            return False
        here = self.seen(other if need.port == "next" and other is not None else layer, need.port)
        there = self.seen(other, "output") if need.target == "next" and other is not None else self.seen(layer, "input")
        return (here.grid, here.positions) != (there.grid, there.positions) or here.calls > 1 or there.calls > 1

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
        """The need that serves another."""
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
        every = {need.target for layer in self.layers for need in self.needs(layer) if need.target}
        return {target for target in every if not isinstance(target, Other)}

    @property
    def gradients(self) -> bool:
        return any("grad" in site.port for site in self.sites())

    def sampled(self, need: Need) -> bool:
        """Whether a need reads a sample of the positions only."""
        return self.positions is not None and need.statistic in SAMPLED and need.view == "positions"

    def groups_of(self, layer: Layer, need: Need) -> int:
        wide = need.statistic in SQUARE and max(self._widths(layer, need)) > GROUPED_WIDTH
        return 1 if wide else self.groups

    def _widths(self, layer: Layer, need: Need) -> tuple[int, int]:
        """Units at a need's port, and columns of what stands beside them."""
        width = self.seen(layer, need.port).width
        if layer.geometry is not None and need.statistic.entries:
            width *= math.prod(layer.geometry.kernel)
        if isinstance(need.target, Other):
            return width, self.recording.seen[str(need.target)].width
        beside = self.recording.classes if isinstance(need.target, str) and "logits" in need.target else 1
        return width, beside

    def nbytes(self, layer: Layer, need: Need) -> int:
        """Bytes of a statistic's sums over all its groups."""
        width, beside = self._widths(layer, need)
        return 8 * self.groups_of(layer, need) * numbers(need.statistic, width, beside, self.recording.classes)

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
        return extra / max(1, self.recording.flops * (3 if self.gradients else 1))

    @property
    def total_bytes(self) -> int:
        sums = sum(self.nbytes(layer, need) for layer in self.layers for need in self.needs(layer))
        return sums + self.waiting_bytes + self.held_bytes

    @property
    def waiting_bytes(self) -> int:
        """Rows that wait for company: buffers of small maps and of a row a sample."""
        return sum(4 * sum(CAPACITY.values()) * self.seen(*site).width for site in self.sites())

    @property
    def held_bytes(self) -> int:
        """Rows that wait for those of another site, of one batch."""
        held = {o for layer in self.layers for o in [layer] if any(self._meets(need) for need in self.needs(o))}
        return sum(self.recording.samples * self.seen(layer, "output").nbytes for layer in held)

    def _meets(self, need: Need) -> bool:
        return isinstance(need.target, Other) and need.view == "positions"

    def check(self, budget: float | None) -> None:
        """Raises MemoryError, with the ways out, where the plan takes more bytes than the budget."""
        if budget is None or self.total_bytes <= budget:
            return
        layer, need = max(((a, b) for a in self.layers for b in self.needs(a)), key=lambda pair: self.nbytes(*pair))
        raise MemoryError(
            f"the plan takes {self.total_bytes / 2**20:,.0f} MiB, budget.memory is {budget / 2**20:,.0f} MiB; the "
            f"largest is {need} at {layer.name} with {self.nbytes(layer, need) / 2**20:,.0f} MiB: choose fewer layers "
            "(layers=), fewer groups (groups=1), other metrics, or a larger budget"
        )

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
                "waits_for": str(need.target) if self._meets(need) else None,
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
        return need._replace(view="samples") if seen.flat and seen.calls == 1 else need

    def _provider(self, layer: Layer, need: Need, wanted: set[Need]) -> Need:
        """What a need is read off: a statistic that holds more, of the same rows in the same groups."""
        for statistic in serves(need.statistic):
            richer = need._replace(statistic=statistic)
            alike = self.sampled(richer) == self.sampled(need) and self.groups_of(layer, richer) == self.groups_of(layer, need)
            if richer in wanted and alike:
                return self._provider(layer, richer, wanted)  # which may itself be read off one that is richer still
        return need
