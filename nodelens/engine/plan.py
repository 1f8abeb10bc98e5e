"""The plan of a pass: its sites, their cost in bytes and operations, and the checks before the data are read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from nodelens.metrics import Metric, Need
from nodelens.metrics.need import Other
from nodelens.metrics.sets import is_default
from nodelens.network.group_layer import GroupLayer
from nodelens.network.hooks import Site
from nodelens.network.layers import ASSOCIATION, Layer, pairs_of
from nodelens.network.sharded import class_name, is_sharded
from nodelens.network.streams import side_of
from nodelens.network.targets import check_token_target
from nodelens.statistics import kernels

from .association_methods import vector_bytes
from .associations import check_associations, with_stack
from .buffered import buffer_bytes, held, held_bytes
from .covariance import CovariancePolicy
from .dry_run import DryRun
from .layout import PassLayout, Place, Reduce
from .members import Members, UnreadableGroupsError
from .overhead import extra_operations
from .validation import check_parameter, measurable
from .wide_sites import check_width, omit_products, restrict_needs


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
        """The plan for a model's layers, given its dry run.

        ``optional`` leaves out layers that the forward pass never calls and lists them in ``never_called``. ``pairs``: layer pairs
        for edge metrics, consecutive, all, or names. ``per_token``: the targets with one value per token. ``notes`` of the plan:
        which of the default metrics are left out because the data have no labels, what ``omit_products`` leaves out, and which
        associations exist at no layer.

        Raises ValueError for a layer that is never called, a metric without its weights or target, and a site that is too wide.
        """
        if precision not in ("float32", "float64"):
            raise ValueError(f"precision is {precision!r}; products are formed in float32 or float64")
        members, dry_run = members or Members(), dry_run.bound(model)
        member_layers = [layer for layer in members.layers if layer is not members.model]
        never_called = [layer for layer in [*layers, *member_layers] if f"{layer.name}.output" not in dry_run.seen]
        if never_called and (not optional or member_layers or len(never_called) == len(layers)):
            remedy = "name another layer, such as the module that takes its output"
            if never_called[0] in member_layers:
                remedy = "leave its group out (freeze=), or score it by weights (magnitude)"
            why = (
                f"is never called by {class_name(model)}.forward (no token of the first samples goes to it, or its parent reads "
                "its weight directly)"
            )
            raise UnreadableGroupsError(
                f"layer {never_called[0].name!r} {why}: {remedy}", members.unread({la.name: why for la in never_called})
            )
        layers = [layer for layer in layers if layer not in never_called]
        default = is_default(metrics)
        metrics, unlabelled = measurable(metrics, dry_run) if default else (metrics, ())
        settings = precision, frozenset(per_token), pairs_of(layers, pairs), covariance or CovariancePolicy()
        names = [layer.name for layer in never_called]
        more: dict[str, Any] = {"members": members, "seed": seed, "reduce": reduce, "optional": optional, "notes": unlabelled}
        more |= {"sharded": is_sharded(model)}
        plan = omit_products(cls(layers, metrics, dry_run, groups, positions, names, *settings, **more), optional, default)
        plan = with_stack(plan)
        plan = replace(plan, notes=(*plan.notes, *check_associations(plan)))
        for name, metric in metrics.items():
            check_parameter(plan, name, metric, optional)
            for need in metric.needs().values() if dry_run.tokens else ():
                check_token_target(name, need.target, dry_run.classes, plan.per_token)  # type: ignore[arg-type]
        check_width(plan)
        if dry_run.refusal and (plan.reads_predictions or plan.gradients):
            raise ValueError(dry_run.refusal)
        return plan

    def with_kernels(self, option: str, device: torch.device, batches: float = 100) -> "Plan":
        """The plan with the back end that an option names. batches: how many are read; a hundred where nobody knows.

        Raises ValueError as ``kernels.chosen`` does.
        """
        seen = (self.seen(*site) for site in self.sites() if site.port != "model" and not site.port.startswith(ASSOCIATION))
        nbytes = batches * self.dry_run.samples * sum(each.nbytes for each in seen)
        return replace(self, kernels=kernels.chosen(option, device, nbytes))

    def resolve(self, metric: Metric, place: Place) -> dict[str, tuple[Layer, Need]]:
        """What a metric needs at a place: for each argument of the metric a layer and the need there.

        Empty if there is no next layer but the metric needs one, if the covariance policy leaves the metric out, or if the metric
        pairs rows with predictions and the rows of the layer are others, or if no rows or gradients were seen.
        """
        needs = self.wanted(metric, place)
        return {} if self.unread(needs) or self.unpaired(needs) else restrict_needs(self, place[0], needs)

    def unread(self, needs: Mapping[str, tuple[Layer, Need]]) -> str:
        """Why a site has no rows, or no gradients, that a metric needs; empty if all have."""
        for layer, need in needs.values():
            sites = [(layer.name, need.port), *([need.target] if isinstance(need.target, Other) else [])]
            for name, port in sites if need.port != "model" else ():
                if reason := self.seen_at(name, port).unread or ("grad" in port and self.no_gradient.get(name)):
                    return str(reason)
            if need.port.startswith(ASSOCIATION):
                plain = need._replace(port=ASSOCIATION)
                if reason := need.options[0].refused or self.no_derivative.get((layer.name, plain)):
                    return str(reason)
        return ""

    def without(
        self, unread: Mapping[str, str], no_gradient: Mapping[str, str], no_derivative: Mapping[tuple[str, Need], str]
    ) -> "Plan":
        """The plan once the data are read: layers of which no rows could be made, or that no gradient reached, and why.

        Raises ValueError for an association that exists at no layer, if nothing else is measured.
        """
        if not unread and not no_gradient and not no_derivative:
            return self
        found = {site: replace(seen, unread=unread.get(site.rpartition(".")[0], "")) for site, seen in self.dry_run.seen.items()}
        seen = {site: each if each.unread else self.dry_run.seen[site] for site, each in found.items()}
        dry_run = replace(self.dry_run, seen=seen)
        plan = replace(self, dry_run=dry_run, no_gradient=no_gradient, no_derivative=no_derivative)
        nowhere = check_associations(plan) if no_derivative else ()
        return replace(plan, notes=tuple(dict.fromkeys((*plan.notes, *nowhere))))

    def unpaired(self, needs: Mapping[str, tuple[Layer, Need]]) -> str:
        """Why the rows of a layer cannot be paired with the target of each prediction; empty if they can."""
        for layer, need in needs.values():
            if need.view != "tokens" or isinstance(layer, GroupLayer):
                continue
            seen, count = self.seen(layer, need.port), self.dry_run.predictions
            encoder = self.dry_run.decoder and side_of(layer, need.port) not in self.dry_run.decoder
            if encoder or seen.packed or seen.positions != count:
                rows = f"{seen.positions} rows per sample"
                rows = "rows for some tokens only" if seen.packed else f"{rows} of the encoder" if encoder else rows
                return f"the target has one value for each of {count} predictions of a sample, and {layer.title} has {rows}"
        return ""

    def sites(self) -> list[Site]:
        """Every site that is read: those of the needs, of paired targets, and of sums over the whole model."""
        ports = {layer.name: {need.port for need in self.needs(layer)} for layer in self.read}
        for other in self.others:
            ports.setdefault(other.layer, set()).add(other.port)
        for layer in self.layers if self.stack is not None and self.stack.name in ports else ():
            ports.setdefault(layer.name, set()).add(ASSOCIATION)
        for layer, port in self.watched:
            ports.setdefault(layer.name, set()).add(port)
        return [Site(layer, port) for layer in self.every_layer if layer.name in ports for port in sorted(ports[layer.name])]

    @property
    def rounds(self) -> int:
        """How often the data are read in one pass."""
        needs = [] if self.members.model is None else self.needs(self.members.model)
        return max([1, *(need.statistic.times(*need.options) for need in needs)])  # type: ignore[attr-defined]

    @cached_property
    def watched(self) -> list[Site]:
        """Sites whose rows feed sums over the whole model."""
        needs = [] if self.members.model is None else self.needs(self.members.model)
        ports = dict.fromkeys(port for need in needs if (port := need.statistic.watches(*need.options)))  # type: ignore[attr-defined]
        return [Site(layer, port) for port in ports for layer in self.members.groups]

    @cached_property
    def others(self) -> set[Other]:
        """Sites whose rows are the paired target of another site."""
        return {need.target for layer in self.read for need in self.needs(layer) if isinstance(need.target, Other)}

    @property
    def overwritten(self) -> set[str]:
        there = (layer for layer in self.every_layer if layer not in (self.members.model, self.stack))
        return {layer.name for layer in there if self.seen(layer, "output").overwritten}

    @property
    def targets(self) -> set:
        """Targets with one value per sample, computed from logits and labels."""
        every = {need.target for layer in self.read for need in self.needs(layer) if need.target and need.view != "tokens"}
        return {target for target in every if not isinstance(target, Other)}

    @property
    def reads_predictions(self) -> bool:
        """Whether anything is computed from the model's predictions."""
        by_token = any(need.view == "tokens" for layer in self.read for need in self.needs(layer))
        return by_token or self.members.model is not None or bool(self.targets - {"label", "given"})

    @cached_property
    def derivatives(self) -> set[str]:
        """What is differentiated besides the loss: predictions, loss, hessian, inputs; and values, which are not."""
        every = (need for layer in self.read for need in self.needs(layer) if need.port.startswith(ASSOCIATION))
        return {need.options[0].of for need in every}

    @property
    def from_inputs(self) -> bool:
        """Whether the graph of derivatives starts at the inputs: a graph that starts at a layer breaks at in-place operations."""
        return "inputs" in self.derivatives or (bool(self.derivatives) and bool(self.overwritten))

    @property
    def gradients(self) -> bool:
        return any("grad" in site.port for site in self.sites())

    def overhead(self) -> float:
        """Estimated extra cost of the pass, as a share of a bare forward pass (and backward pass if gradients are needed)."""
        return extra_operations(self) / max(1, self.dry_run.flops * (3 if self.gradients else 1))

    @property
    def total_bytes(self) -> int:
        sums = sum(self.nbytes(layer, need) for layer in self.read for need in self.needs(layer))
        return sums + self.buffer_bytes + self.held_bytes + self.vector_bytes

    @property
    def buffer_bytes(self) -> int:
        """Upper bound on the bytes of buffered rows."""
        return sum(buffer_bytes(self, site) for site in self.sites())

    @property
    def held_bytes(self) -> int:
        """Bytes of the rows of one batch that are held for a paired site or for the logits."""
        return sum(held_bytes(self, site) for site in held(self))

    @property
    def vector_bytes(self) -> int:
        """Upper bound on the bytes of the vectors of derivatives that are handled at once."""
        return vector_bytes(self)

    def rows(self) -> list[dict]:
        """The plan as a table, one row per statistic of a layer."""
        return [
            {
                "layer": layer.name,
                "statistic": str(need),
                "width": None if need.port == "model" else self.seen(layer, need.port).width,
                "rows_per_sample": self.rows_per_sample(layer, need),
                "groups": self.groups_of(layer, need),
                "bytes": self.nbytes(layer, need),
                "waits_for": str(getattr(need.target, "__name__", need.target)) if self.is_held(need) else None,
            }
            for layer in self.read
            for need in self.needs(layer)
        ]
