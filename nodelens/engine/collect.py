"""One pass: every site's collector, one batch after another, and the sites whose rows meet."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nodelens.metrics import Need
from nodelens.metrics.need import Other
from nodelens.network.batch import Batch
from nodelens.network.group_layer import GroupLayer
from nodelens.network.hooks import Site
from nodelens.network.targets import Loss, target_of, token_target
from nodelens.statistics import Accumulator
from nodelens.statistics.group_slices import draw, group_slices
from nodelens.statistics.linalg import exact_products
from nodelens.statistics.rows import Rows
from nodelens.statistics.sample_hash import mix

from .collector import TERMS, Collector, ModelCollector, WeightCollector
from .plan import Plan


class Meeting:
    """Rows of two sites at the same positions: the first waits for the second, within a batch."""

    def __init__(self, need: Need, owner: Collector, other: Site):
        self.need, self.owner, self.other = need, owner, other
        self.held: dict[Site, Rows] = {}
        self.shift: dict[Site, Tensor] = {}

    def see(self, site: Site, rows: Rows, batch: Batch) -> None:
        """Takes the rows of one of the two; forms products once both are there."""
        plan = self.owner.plan
        drawn = None
        if plan.positions and plan.sampled(self.need):
            drawn = draw(batch.hashes, rows.keep, rows.raw.shape[2], plan.positions, self.owner.seed)
        rows = (rows if drawn is None else rows.at(drawn)).finite()
        if site not in self.shift:
            self.shift[site] = rows.pilot()
        first = len(self.held) < 1 and self.owner.site != self.other
        # later operations may write into what a hook saw
        self.held[site] = (rows.copy() if first and drawn is None else rows).about(self.shift[site], bool(self.shift[site].any()))
        if first:
            return
        x, z = self.held[self.owner.site], self.held[self.other]
        self.held = {}
        with exact_products():
            for g, a, b in group_slices(batch.group, max(1, TERMS // x.raw.shape[2])):
                self.owner.put(self.need, g, self.need.statistic.of(x.take(a, b), z.take(a, b)))  # type: ignore[attr-defined]


@dataclass(frozen=True)
class TargetTokens:
    """The tokens of a batch that have a target.

    Shapes: place (m,), where they are among all B x T; beside (m, t) float64, finite; group (m,) and hashes (m,) on the CPU
    """

    shape: tuple[int, int]
    place: Tensor
    beside: Tensor
    group: Tensor
    hashes: Tensor

    @classmethod
    def of(cls, beside: Tensor, batch: Batch, positions: int | None, seed: int) -> "TargetTokens":
        """Of a target (B, T, t), NaN where a token has none; tokens of the padding, and those not drawn, are left out."""
        samples, length = beside.shape[:2]
        mask = batch.mask if batch.mask is not None and batch.mask.shape == (samples, length) else None
        known = beside.isfinite().all(2)
        known = known if mask is None else known & mask
        drawn = draw(batch.hashes, mask, length, positions, seed) if positions else None
        if drawn is not None:
            known = known & torch.zeros_like(known).scatter(1, drawn.to(known.device), True)
        place = known.flatten().nonzero()[:, 0]
        each, row = place.cpu(), (torch.ones(samples, length) if mask is None else mask.cpu()).cumsum(1).long().flatten()
        sample = each // length
        hashes = mix(batch.hashes[sample], row[each])  # a token's number among those that count: padding does not move it
        return cls((samples, length), place, beside.flatten(0, 1)[place], batch.group[sample], hashes)


class Waiting:
    """Rows of a site until the batch ends: the tokens' targets are made of its logits."""

    def __init__(self, owner: Collector):
        self.owner, self.held = owner, list[Rows]()
        self.shift: Tensor | None = None
        layer, port = owner.site
        self.copied = owner.plan.seen(layer, port).overwritten

    def see(self, rows: Rows) -> None:
        """Takes the rows of one call."""
        self.held.append(rows.copy() if self.copied else rows)

    def end(self, tokens: Mapping[Any, TargetTokens]) -> None:
        """Adds the rows at the tokens that have a target."""
        for rows in self.held:
            for target in dict.fromkeys(need.target for need in self.owner.by_token):
                self._add(rows, tokens[target], [need for need in self.owner.by_token if need.target == target])
        self.held = []

    def _add(self, rows: Rows, at: TargetTokens, needs: list[Need]) -> None:
        samples, _, positions = rows.raw.shape
        if (samples, positions) != at.shape:
            raise ValueError(
                f"{self.owner.site} has {positions} rows a sample, and target {needs[0].target!r} is one for each of "
                f"{at.shape[1]} tokens: leave the layer out (layers=), or metrics with a target"
            )
        flat = rows.raw.transpose(1, 2).flatten(0, 1)[at.place]
        found = self.owner.only_finite(Rows(flat.T[None]))
        if self.shift is None:
            self.shift = found.pilot()
        moved, keep = bool(self.shift.any()), None if found.keep is None else found.keep[0]
        with exact_products():
            for g, a, b in group_slices(at.group, TERMS):
                kept = None if keep is None else keep[a:b]
                one = Rows(flat[a:b].T[None], None if kept is None else kept[None], self.shift, (), moved)  # a sample of them
                each = Rows(flat[a:b, :, None], None if kept is None else kept[:, None], self.shift, (), moved)
                for need in needs:
                    beside = at.beside[a:b, 0].long() if need.target == "label" else at.beside[a:b]
                    hashes = {"hashes": at.hashes[a:b]} if need.statistic.takes_hashes else {}
                    made = need.statistic.of(each, beside, **hashes) if need.statistic.paired() else need.statistic.of(one)  # type: ignore[attr-defined]
                    self.owner.put(need, g, made)


_KINDS: dict[str, type[Collector]] = {"weight*grad": WeightCollector, "model": ModelCollector}


class Pass:
    """All sites' collectors, one batch after another."""

    def __init__(self, plan: Plan, seed: int = 0):
        self.plan, self.seed, self.round = plan, seed, 0
        kinds = {site: _KINDS.get(site.port, Collector) for site in plan.sites()}
        self.collectors = {site: kind(site, plan, seed) for site, kind in kinds.items()}
        self.samples = torch.zeros(plan.groups, dtype=torch.int64)  # in each group
        self.batch: Batch | None = None
        self.meetings: dict[Site, list[Meeting]] = {site: [] for site in self.collectors}
        by_name = {Other(site.layer.name, site.port): site for site in self.collectors}
        for site, collector in self.collectors.items():
            for need in collector.sums:
                if isinstance(need.target, Other) and need.view == "positions":
                    meeting = Meeting(need, collector, by_name[need.target])
                    for each in {site, meeting.other}:
                        self.meetings[each].append(meeting)
        self.waiting = {site: Waiting(collector) for site, collector in self.collectors.items() if collector.by_token}

        whole = [collector for site, collector in self.collectors.items() if site.port == "model"]
        self.model_sums: list[Any] = [sums for collector in whole for sums in collector.sums.values()]

    @property
    def rounds(self) -> int:
        """How often the data are read."""
        return max([1, *(sums.rounds for sums in self.model_sums)])

    def sites(self, round: int = 0) -> list[Site]:
        """The sites that are read in a round: all in the first, later those that sums over the model watch."""
        chosen = [site for site in self.collectors if site.port != "model"]
        ports = {sums.port for sums in self.model_sums if sums.rounds > round}
        return chosen if not round else [site for site in chosen if isinstance(site.layer, GroupLayer) and site.port in ports]

    def begin_round(self, round: int) -> None:
        """Says which reading of the data begins, from 0."""
        self.round = round
        for sums in self.model_sums:
            if 0 < round < sums.rounds:
                sums.again()

    def begin(self, batch: Batch) -> None:
        self.batch = batch
        for sums in self.model_sums:
            sums.begin(batch)

    def see(self, site: Site, shown: Any) -> None:
        """Takes what a capture shows of a site."""
        if self.batch is None:
            raise RuntimeError(f"{site} shows rows before a batch began")
        collector = self.collectors[site]
        rows = collector.rows_of(shown, self.batch)
        for sums in self.model_sums:
            if sums.port == site.port and isinstance(site.layer, GroupLayer):
                sums.see(site.layer, rows)
        if self.round:
            return
        collector.see(rows, self.batch)
        for meeting in self.meetings[site]:
            meeting.see(site, rows, self.batch)
        if site in self.waiting:
            self.waiting[site].see(rows)

    def end(self, logits: Tensor | None, loss: Loss | None = None) -> None:
        """Ends a batch: targets are known, one row per sample is complete."""
        batch = self.batch
        assert batch is not None
        with torch.no_grad():
            for sums in self.model_sums:
                if sums.rounds > self.round:
                    sums.end(logits, loss)
        if self.round:
            self.batch = None
            return
        z = None if logits is None else logits.detach()
        with torch.no_grad():
            beside: dict[Any, Tensor] = {name: target_of(name, z, batch.labels, batch.targets) for name in self.plan.targets}
            wanted = {need.target for waiting in self.waiting.values() for need in waiting.owner.by_token}
            tokens = {name: self._tokens(name, z, batch) for name in wanted}
            for waiting in self.waiting.values():
                waiting.end(tokens)
            rows = {site: collector.close() for site, collector in self.collectors.items()}
            for site, own in rows.items():
                if own is not None:
                    known = own.mask()
                    beside[Other(site.layer.name, site.port)] = own.raw[:, :, 0].where(known, torch.nan)
            for site, collector in self.collectors.items():
                collector.end(rows[site], batch, beside)
        self.samples += torch.bincount(batch.group, minlength=len(self.samples))
        self.batch = None

    def _tokens(self, name: Any, logits: Tensor | None, batch: Batch) -> TargetTokens:
        if logits is None:
            raise ValueError(f"target {name!r} needs logits, the model gave none")
        value = token_target(name, logits, batch.labels, batch.targets)
        return TargetTokens.of(value, batch, self.plan.positions, self.seed)

    def flush(self) -> None:
        with torch.no_grad():
            for collector in self.collectors.values():
                collector.flush()

    def state_dict(self) -> dict[str, Tensor]:
        """What was added so far, as plain tensors; rows that wait are added first."""
        self.flush()
        state = {
            f"{k}/{name}": t
            for k, c in enumerate(self.collectors.values())
            for j, a in enumerate(c.sums.values())
            for name, t in ((f"{j}/{n}", t) for n, t in a.state_dict().items())
        }
        left_out = torch.tensor([c.left_out for c in self.collectors.values()])
        return state | {"samples": self.samples, "left_out": left_out}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where a pass of the same plan was saved."""
        self.samples = state["samples"].clone()
        for k, c in enumerate(self.collectors.values()):
            c.left_out = int(state["left_out"][k])
            for j, a in enumerate(c.sums.values()):
                prefix = f"{k}/{j}/"
                a.load_state_dict({n[len(prefix) :]: t for n, t in state.items() if n.startswith(prefix)})

    def sums(self) -> dict[tuple[str, Need], Accumulator]:
        """Every accumulator by layer and need; complete after ``flush``."""
        return {(site.layer.name, need): a for site, c in self.collectors.items() for need, a in c.sums.items()}
