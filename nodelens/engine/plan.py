"""The plan of a pass: its sites, what they will take, and whether that is allowed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from nodelens.metrics import Metric, Need
from nodelens.metrics.need import Other
from nodelens.network.hooks import Site
from nodelens.network.layers import Layer, pairs_of
from nodelens.network.targets import check_token_target
from nodelens.statistics.costs import PAIRS

from .buffered import buffer_bytes, held, held_bytes
from .covariance import CovariancePolicy
from .dry_run import DryRun
from .layout import BALANCE, PassLayout, Place, Reduce
from .members import Members
from .narrow import check_width, narrowed
from .validation import check_parameter


@dataclass(frozen=True)
class Plan(PassLayout):
    """A layout with its sites, and their cost in bytes and operations."""

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
        members: Members | None = None,
        seed: int = 0,
        reduce: Reduce = "sum",
    ) -> "Plan":
        """A plan for a model's layers, after one recorded forward of a few samples.

        ``optional`` leaves out layers that the forward never calls (and says so); otherwise such a layer is an error, and
        so is a metric that needs weights at a layer without. ``pairs`` of layers for edges: consecutive, all, or names.
        ``per_token``: which of label and given the data have one of a token, where each token has logits of its own.
        """
        if precision not in ("float32", "float64"):
            raise ValueError(f"precision is {precision!r}; products are formed in float32 or float64")
        members = members or Members()
        shown = [layer for layer in members.layers if layer is not members.model]
        silent = [layer for layer in [*layers, *shown] if f"{layer.name}.output" not in dry_run.seen]
        if silent and (not optional or shown or len(silent) == len(layers)):
            mend = "name another layer, such as the module that takes its output"
            mend = "leave its group out of the scope, or score it by weights" if silent[0] in shown else mend
            raise ValueError(
                f"layer {silent[0].name!r} is never called by {type(model).__name__}.forward (its parent may read "
                f"its weight directly): {mend}"
            )
        layers = [layer for layer in layers if layer not in silent]
        beside = frozenset(per_token), pairs_of(layers, pairs), covariance or CovariancePolicy()
        never = [layer.name for layer in silent]
        of_groups = {"members": members, "seed": seed, "reduce": reduce}
        plan = cls(layers, metrics, dry_run, groups, positions, never, precision, *beside, **of_groups)  # type: ignore[arg-type]
        for name, metric in metrics.items():
            check_parameter(plan, name, metric, optional)
            for need in metric.needs().values() if dry_run.tokens else ():
                check_token_target(name, need.target, dry_run.classes, plan.per_token)  # type: ignore[arg-type]
        check_width(plan)
        return plan

    def resolve(self, metric: Metric, place: Place) -> dict[str, tuple[Layer, Need]]:
        """What a metric needs at a place: for each argument the layer where it is added up, and the need there.

        Empty where it needs a next layer and there is none, and where ``wide`` leaves it out.
        """
        return narrowed(self, place[0], self.wanted(metric, place))

    def sites(self) -> list[Site]:
        """Every site that is read, each layer's own and those whose rows stand beside others'."""
        ports: dict[str, set[str]] = {layer.name: {need.port for need in self.needs(layer)} for layer in self.every_layer}
        for other in self.others:
            ports[other.layer].add(other.port)
        for layer, port in self.watched:
            ports[layer.name].add(port)
        return [Site(layer, port) for layer in self.every_layer for port in sorted(ports[layer.name])]

    @property
    def rounds(self) -> int:
        """How often the data are read in one pass."""
        needs = [] if self.members.model is None else self.needs(self.members.model)
        return max([1, *(need.statistic.times(*need.options) for need in needs)])  # type: ignore[attr-defined]

    @cached_property
    def watched(self) -> list[Site]:
        """Sites that sums over the whole model take rows from."""
        needs = [] if self.members.model is None else self.needs(self.members.model)
        ports = dict.fromkeys(port for need in needs if (port := need.statistic.watches(*need.options)))  # type: ignore[attr-defined]
        return [Site(layer, port) for port in ports for layer in self.members.groups]

    @cached_property
    def others(self) -> set[Other]:
        """Sites whose rows stand beside those of another."""
        return {need.target for layer in self.every_layer for need in self.needs(layer) if isinstance(need.target, Other)}

    @property
    def overwritten(self) -> set[str]:
        there = (layer for layer in self.every_layer if layer is not self.members.model)
        return {layer.name for layer in there if self.seen(layer, "output").overwritten}

    @property
    def targets(self) -> set:
        """What is made of logits and labels for each sample."""
        every = {need.target for layer in self.every_layer for need in self.needs(layer) if need.target and need.view != "tokens"}
        return {target for target in every if not isinstance(target, Other)}

    @property
    def gradients(self) -> bool:
        return any("grad" in site.port for site in self.sites())

    def overhead(self) -> float:
        """Estimated cost of the pass over a bare forward (with its backward, where gradients are taken), as a share."""
        extra = 0.0
        for layer in self.every_layer:
            for need in self.needs(layer):
                if need.port == "model":
                    continue
                seen = self.seen(layer, need.port)
                rows = self._rows_a_sample(layer, need)
                width, beside = self._widths(layer, need)
                beside = beside if isinstance(need.target, Other) else width
                products = 2 * width * beside * rows if need.statistic in PAIRS else 0
                extra += products + BALANCE * seen.nbytes * rows / seen.positions
        return extra / max(1, self.dry_run.flops * (3 if self.gradients else 1))

    @property
    def total_bytes(self) -> int:
        sums = sum(self.nbytes(layer, need) for layer in self.every_layer for need in self.needs(layer))
        return sums + self.buffer_bytes + self.held_bytes

    @property
    def buffer_bytes(self) -> int:
        """Bytes of buffered rows, at most."""
        return sum(buffer_bytes(self, site) for site in self.sites())

    @property
    def held_bytes(self) -> int:
        """Bytes of rows of one batch that are held until those of another site, or the logits, are there."""
        return sum(held_bytes(self, site) for site in held(self))

    def rows(self) -> list[dict]:
        """The plan as a table: a row a statistic of a layer."""
        return [
            {
                "layer": layer.name,
                "statistic": str(need),
                "width": None if need.port == "model" else self.seen(layer, need.port).width,
                "rows_per_sample": self._rows_a_sample(layer, need),
                "groups": self.groups_of(layer, need),
                "bytes": self.nbytes(layer, need),
                "waits_for": str(getattr(need.target, "__name__", need.target)) if self.meets(need) else None,
            }
            for layer in self.every_layer
            for need in self.needs(layer)
        ]
