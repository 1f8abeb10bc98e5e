"""One pass: every site's collector, one batch after another, and the sites whose rows meet."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .collector import TERMS, Collector, WeightCollector
from .frame import Frame
from .hooks import Site
from .linalg import exact_products
from .metrics import Need
from .metrics.base import Other
from .plan import Plan
from .rows import Rows
from .runs import draw, runs_of
from .statistics import Accumulator
from .targets import target_of


class Meeting:
    """Rows of two sites at the same positions: the first waits for the second, within a batch."""

    def __init__(self, need: Need, owner: Collector, other: Site):
        self.need, self.owner, self.other = need, owner, other
        self.held: dict[Site, Rows] = {}
        self.shift: dict[Site, Tensor] = {}

    def see(self, site: Site, rows: Rows, frame: Frame) -> None:
        """Takes the rows of one of the two; forms products once both are there."""
        plan = self.owner.plan
        drawn = None
        if plan.positions and plan.sampled(self.need):
            drawn = draw(frame.keys, rows.raw.shape[2], plan.positions, self.owner.seed)
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
            for g, a, b in runs_of(frame.group, max(1, TERMS // x.raw.shape[2])):
                self.owner.put(self.need, g, self.need.statistic.of(x.take(a, b), z.take(a, b)))  # type: ignore[attr-defined]


class Pass:
    """All sites' collectors, one batch after another."""

    def __init__(self, plan: Plan, seed: int = 0):
        self.plan = plan
        kinds = {site: WeightCollector if site.port == "weight*grad" else Collector for site in plan.sites()}
        self.collectors = {site: kind(site, plan, seed) for site, kind in kinds.items()}
        self.samples = torch.zeros(plan.groups, dtype=torch.int64)  # in each group
        self.frame: Frame | None = None
        self.meetings: dict[Site, list[Meeting]] = {site: [] for site in self.collectors}
        by_name = {Other(site.layer.name, site.port): site for site in self.collectors}
        for site, collector in self.collectors.items():
            for need in collector.sums:
                if isinstance(need.target, Other) and need.view == "positions":
                    meeting = Meeting(need, collector, by_name[need.target])
                    for each in {site, meeting.other}:
                        self.meetings[each].append(meeting)

    def begin(self, frame: Frame) -> None:
        self.frame = frame

    def see(self, site: Site, shown: Any) -> None:
        """Takes what a capture shows of a site."""
        if self.frame is None:
            raise RuntimeError(f"{site} shows rows before a batch began")
        collector = self.collectors[site]
        rows = collector.rows_of(shown, self.frame)
        collector.see(rows, self.frame)
        for meeting in self.meetings[site]:
            meeting.see(site, rows, self.frame)

    def end(self, logits: Tensor | None) -> None:
        """Ends a batch: targets are known, a row a sample is complete."""
        frame = self.frame
        assert frame is not None
        z = None if logits is None else logits.detach()
        with torch.no_grad():
            beside: dict[Any, Tensor] = {name: target_of(name, z, frame.labels, frame.targets) for name in self.plan.targets}
            rows = {site: collector.close() for site, collector in self.collectors.items()}
            for site, own in rows.items():
                if own is not None:
                    known = own.mask()
                    beside[Other(site.layer.name, site.port)] = own.raw[:, :, 0].where(known, torch.nan)
            for site, collector in self.collectors.items():
                collector.end(rows[site], frame, beside)
        self.samples += torch.bincount(frame.group, minlength=len(self.samples))
        self.frame = None

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
