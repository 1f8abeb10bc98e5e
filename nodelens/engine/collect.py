"""One pass: the collectors of all sites, batch by batch, and the sites whose rows are paired."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nodelens.metrics import Need
from nodelens.metrics.need import Other
from nodelens.network.batch import Batch
from nodelens.network.derivatives import Differentiation
from nodelens.network.group_layer import GroupLayer, UnitValues
from nodelens.network.hooks import Site
from nodelens.network.layers import ASSOCIATION
from nodelens.network.objective import Objective
from nodelens.network.targets import target_of, token_target
from nodelens.statistics import Accumulator, kernels
from nodelens.statistics.gram import TERMS
from nodelens.statistics.group_slices import draw, group_slices, sorting
from nodelens.statistics.linalg import exact_products
from nodelens.statistics.repeats import Repeats
from nodelens.statistics.rows import Rows

from .collector import Collector
from .derivative_collector import DerivativeCollector
from .derivatives import differentiate
from .members import UnreadableGroupsError
from .other_collectors import ModelCollector, WeightCollector
from .pass_state import SeenOrder, collector_state, restore_collector
from .plan import Plan
from .token_rows import TargetTokens, TokenRows


class PairedSites:
    """Pairs the rows of two sites at the same positions: the rows of the site that runs first are held within the batch."""

    def __init__(self, need: Need, owner: Collector, other: Site):
        self.need, self.owner, self.other = need, owner, other
        self.held: dict[Site, Rows] = {}
        self.shift: dict[Site, Tensor] = {}

    def see(self, site: Site, rows: Rows, batch: Batch) -> None:
        """Takes the rows of one of the two sites; adds the products once both are there."""
        plan = self.owner.plan
        chosen = None
        if plan.positions and plan.sampled(self.need):
            chosen = draw(batch.hashes, rows.keep, rows.raw.shape[2], plan.positions, self.owner.seed)
        rows = (rows if chosen is None else rows.at(chosen)).finite()
        if site not in self.shift:
            self.shift[site] = rows.pilot()
        first = len(self.held) < 1 and self.owner.site != self.other
        # copy, because later operations may write into the captured tensor
        self.held[site] = (rows.copy() if first and chosen is None else rows).about(self.shift[site], bool(self.shift[site].any()))
        if first:
            return
        x, z = self.held[self.owner.site], self.held[self.other]
        self.held, order, group = {}, sorting(batch.group), batch.group
        if order is not None:
            x, z, group = x.index(order), z.index(order), group[order]
        with exact_products():
            for g, a, b in group_slices(group, max(1, TERMS // x.raw.shape[2])):
                self.owner.put(self.need, g, self.need.statistic.of(x.take(a, b), z.take(a, b)))  # type: ignore[attr-defined]


_KINDS: dict[str, type[Collector]] = {
    "weight*grad": WeightCollector,
    "model": ModelCollector,
    ASSOCIATION: DerivativeCollector,
    f"{ASSOCIATION}/sample": DerivativeCollector,
}


class Pass:
    """The collectors of all sites, which see one batch after another."""

    def __init__(self, plan: Plan, objective: Objective, seed: int = 0, saves: bool = True):
        """saves: whether its state may be saved, and with it which batches were seen."""
        self.plan, self.objective, self.seed, self.saves, self.round = plan, objective, seed, saves, 0
        kinds = {site: _KINDS.get(site.port, Collector) for site in plan.sites()}
        self.collectors = {site: kind(site, plan, seed) for site, kind in kinds.items()}
        self.samples = torch.zeros(plan.groups, dtype=torch.int64)  # per group
        self.unlabelled = torch.zeros_like(self.samples)  # of these, without a label
        self.repeats = Repeats()
        self.seen = SeenOrder()
        self.no_gradient: dict[str, str] = {}  # why no gradient reached a layer, by name
        self.batch: Batch | None = None
        self.pairs: dict[Site, list[PairedSites]] = {site: [] for site in self.collectors}
        by_name = {Other(site.layer.name, site.port): site for site in self.collectors}
        for site, collector in self.collectors.items():
            for need in collector.sums:
                if isinstance(need.target, Other) and need.view == "positions":
                    pair = PairedSites(need, collector, by_name[need.target])
                    for each in {site, pair.other}:
                        self.pairs[each].append(pair)
        self.token_rows = {site: TokenRows(collector) for site, collector in self.collectors.items() if collector.by_token}

        self.derivatives = [c for c in self.collectors.values() if isinstance(c, DerivativeCollector)]
        self.differentiation = Differentiation()
        model_collectors = [collector for site, collector in self.collectors.items() if site.port == "model"]
        self.model_sums: list[Any] = [sums for collector in model_collectors for sums in collector.sums.values()]

    @property
    def rounds(self) -> int:
        """How often the data are read."""
        return max([1, *(sums.rounds for sums in self.model_sums)])

    def sites(self, round: int = 0) -> list[Site]:
        """The sites read in a round: all in the first; later only those that sums over the whole model watch."""
        chosen = [site for site in self.collectors if site.port != "model" and site.layer is not self.plan.stack]
        ports = {sums.port for sums in self.model_sums if sums.rounds > round}
        return chosen if not round else [site for site in chosen if isinstance(site.layer, GroupLayer) and site.port in ports]

    def begin_round(self, round: int) -> None:
        """Starts a reading of the data, numbered from 0."""
        self.round, self.seen = round, SeenOrder()
        for sums in self.model_sums:
            if 0 < round < sums.rounds:
                sums.again()

    def begin(self, batch: Batch) -> None:
        self.batch, self.seen = batch, self.seen.then(batch) if self.saves else self.seen
        if not self.round and batch.has_ids:
            self.repeats.add(batch.contents(), batch.hashes)
        for sums in self.model_sums:
            sums.begin(batch)

    def see(self, site: Site, captured: Any) -> None:
        """Takes a captured tensor of a site. Raises RuntimeError before the first ``begin``."""
        if self.batch is None:
            raise RuntimeError(f"{site} was captured before a batch began")
        with kernels.using(self.plan.kernels):
            self._see(site, captured, self.batch)

    def _see(self, site: Site, captured: Any, batch: Batch) -> None:
        collector = self.collectors[site]
        rows = self._rows(collector, captured)
        if rows is None:
            return
        for sums in self.model_sums:
            if sums.port == site.port and isinstance(site.layer, GroupLayer):
                sums.see(site.layer, rows)
        if self.round:
            return
        collector.see(rows, batch)
        for pair in self.pairs[site]:
            if not any(self.collectors[each].unread for each in (pair.owner.site, pair.other)):
                pair.see(site, rows, batch)
        if site in self.token_rows:
            self.token_rows[site].see(rows)

    def _rows(self, collector: Collector, captured: Any) -> Rows | None:
        """The rows of a site; None from the first batch on of which none can be made, if the plan can do without the layer."""
        assert self.batch is not None
        try:
            return None if collector.unread else collector.rows_of(captured, self.batch)
        except ValueError as error:
            if not self.plan.optional:
                member = captured.member if isinstance(captured, UnitValues) else None
                name = (member or collector.site).layer.name
                groups = self.plan.members.unread({name: str(error).removeprefix(f"layer {name!r} ")})
                raise (UnreadableGroupsError(str(error), groups) if groups else error) from None
            collector.unread = str(error)
            return None

    @property
    def unread(self) -> dict[str, str]:
        """{layer: why no rows could be made of what it showed}."""
        return {site.layer.name: collector.unread for site, collector in self.collectors.items() if collector.unread}

    def differentiate(self, predictions: Tensor, embedded: Sequence[Tensor]) -> None:
        """Adds what is differentiated while the graph of a batch is there."""
        assert self.batch is not None
        differentiate(self.derivatives, predictions, embedded, self.batch, self.objective, self.seed, self.differentiation)

    def end(self, predictions: Tensor | None) -> None:
        """Ends a batch: computes targets from the predictions and adds what depends on them or on complete samples."""
        batch = self.batch
        assert batch is not None
        with torch.no_grad():
            for sums in self.model_sums:
                if sums.rounds > self.round:
                    sums.end(predictions, self.objective)
        if self.round:
            self.batch = None
            return
        with torch.no_grad(), kernels.using(self.plan.kernels):
            z = None if predictions is None else self.objective.aligned(predictions.detach(), batch.labels)
            paired = z, batch.labels, batch.targets, self.objective
            targets: dict[Any, Tensor] = {name: target_of(name, *paired) for name in self.plan.targets}
            wanted = {need.target for token_rows in self.token_rows.values() for need in token_rows.owner.by_token}
            tokens = {name: self._target_tokens(name, z, batch) for name in wanted}
            for token_rows in self.token_rows.values():
                token_rows.end(tokens)
            rows = {site: collector.close() for site, collector in self.collectors.items()}
            for site, own in rows.items():
                if own is not None:
                    known = own.mask()
                    targets[Other(site.layer.name, site.port)] = own.raw[:, :, 0].where(known, torch.nan)
            for site, collector in self.collectors.items():
                if all(target in targets for target in collector.targets):  # a site that cannot be read is no target
                    collector.end(rows[site], batch, targets)
        self.samples += torch.bincount(batch.group, minlength=len(self.samples))
        if batch.labelled is not None:
            self.unlabelled += torch.bincount(batch.group[~batch.labelled.cpu()], minlength=len(self.samples))
        self.batch = None

    def _target_tokens(self, name: Any, logits: Tensor | None, batch: Batch) -> TargetTokens:
        if logits is None:
            raise ValueError(f"target {name!r} needs logits, but the model returned none")
        value = token_target(name, logits, batch.labels, batch.targets, self.objective)
        return TargetTokens.of(value, batch, self.plan.positions, self.seed)

    def flush(self) -> None:
        with torch.no_grad(), kernels.using(self.plan.kernels):
            for collector in self.collectors.values():
                collector.flush()

    def state_dict(self) -> dict[str, Any]:
        """All that a pass that continues needs, after a batch has ended, as plain values. No row is added for it."""
        return {
            "round": self.round,
            "samples": self.samples,
            "unlabelled": self.unlabelled,
            "repeats": self.repeats.kept(),
            "seen": list(self.seen),
            "collectors": [collector_state(c) for c in self.collectors.values()],
            "pairs": [[pair.shift.get(site) for site in (pair.owner.site, pair.other)] for pair in self._every_pair()],
            "tokens": [rows.shift for rows in self.token_rows.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what ``state_dict`` of a pass with the same plan returned."""
        self.round, self.samples, self.unlabelled = state["round"], state["samples"], state["unlabelled"]
        self.repeats, self.seen = Repeats(state["repeats"]), SeenOrder(*state["seen"])
        for collector, saved in zip(self.collectors.values(), state["collectors"], strict=True):
            restore_collector(collector, saved)
        for pair, shifts in zip(self._every_pair(), state["pairs"], strict=True):
            sites = (pair.owner.site, pair.other)
            pair.shift = {site: shift for site, shift in zip(sites, shifts, strict=True) if shift is not None}
        for rows, shift in zip(self.token_rows.values(), state["tokens"], strict=True):
            rows.shift = shift

    def _every_pair(self) -> list[PairedSites]:
        return list({id(pair): pair for pairs in self.pairs.values() for pair in pairs}.values())

    def counts(self) -> dict[str, Tensor]:
        """How many samples and rows were read, and how many were left out: samples by group, rows by site."""
        every = self.collectors.values()
        return {
            "samples": self.samples.clone(),
            "unlabelled": self.unlabelled.clone(),
            "left_out": torch.tensor([c.left_out for c in every]),
            "rows_seen": torch.tensor([int(c.rows_seen) for c in every]),
            "lost": torch.stack([c.lost for c in every]) if every else torch.zeros(0, len(self.samples), dtype=torch.int64),
        }

    def sums(self) -> dict[tuple[str, Need], Accumulator]:
        """Every accumulator by layer and need; complete after ``flush``."""
        return {(site.layer.name, need): a for site, c in self.collectors.items() for need, a in c.sums.items()}
