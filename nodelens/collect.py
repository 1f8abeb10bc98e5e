"""One pass: what each site shows is cut by group of samples and added to the statistics that are wanted of it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .frame import Frame
from .hooks import Site
from .keys import mix
from .metrics import Need
from .plan import CAPACITY, Plan
from .rows import Rows
from .statistics import Accumulator, Patches, Statistic
from .targets import target_of

CHUNK = 4 << 20  # bytes of rows that one round of reductions reads: they stay in the cache
TERMS = 8192  # rows that one float32 product adds up: its rounding stays below what standard errors resolve


class Collector:
    """Adds what one site shows, as rows of positions at once, as rows of samples when the batch's targets are known."""

    def __init__(self, site: Site, plan: Plan, seed: int = 0):
        self.site, self.plan, self.seed = site, plan, seed
        layer = site.layer
        here = [need for need in plan.needs(layer) if need.port == site.port]
        self.sums = {need: Accumulator(need.statistic, plan.groups_of(layer, need)) for need in here}
        self.views = {need.view for need in here}
        self.shift: dict[str, Tensor] = {}
        self.waiting: dict[str, list[tuple[Rows, Tensor, dict[str, Tensor]]]] = {"positions": [], "samples": []}
        self.held = dict.fromkeys(self.waiting, 0)  # rows that wait
        self.means: list[Rows] = []  # of the batch that passes
        self.left_out = 0

    def see(self, tensor: Tensor, frame: Frame) -> None:
        """Takes what passes: a tensor with the samples of the frame."""
        rows = self.site.layer.rows(tensor, len(frame))
        samples, width, positions = rows.raw.shape
        if frame.mask is not None and frame.mask.shape == (samples, positions):
            rows = Rows(rows.raw, frame.mask, rows.shift, rows.grid)
        rows = rows.about(torch.zeros(width, dtype=torch.float64, device=tensor.device))
        runs = frame.group.unique_consecutive().numel()
        if "positions" not in self.views:
            self.means.append(self._to_samples(self._finite(rows)))
        elif samples * positions >= self.plan.groups * width and runs <= 2 * self.plan.groups:
            means = self._add("positions", rows, frame.group, {"key": frame.keys})
            self.means += [_cat(means)] if means else []
        else:
            self._wait("positions", rows.copy(), frame.group, {"key": frame.keys})
            self.means += [self._to_samples(rows.finite())] if "samples" in self.views else []

    def end(self, frame: Frame, beside: Mapping[str, Tensor]) -> None:
        """Takes what stands beside the batch's samples: labels, targets."""
        if self.means:
            calls, self.means = self.means, []
            self._wait("samples", calls[0] if len(calls) == 1 else self._of_calls(calls), frame.group, dict(beside))

    def flush(self, *views: str) -> None:
        """Adds the rows that still wait."""
        for view in views or tuple(self.waiting):
            held = self.waiting[view]
            if held:
                rows, group = _cat([r for r, _, _ in held]), torch.cat([g for _, g, _ in held])
                beside = {name: torch.cat([b[name] for _, _, b in held]) for name in held[0][2]}
                held.clear()
                self.held[view] = 0
                order = torch.argsort(group, stable=True)
                rows = rows.index(order.to(rows.raw.device))
                if view == "samples":  # few rows: double precision costs little, and standard errors are differences
                    rows = Rows(rows.raw.double(), rows.keep, rows.shift)
                self._add(view, rows, group[order], {k: v[order.to(v.device)] for k, v in beside.items()})

    def _wait(self, view: str, rows: Rows, group: Tensor, beside: dict[str, Tensor]) -> None:
        self.waiting[view].append((rows, group, beside))
        self.held[view] += len(rows) * rows.raw.shape[2]
        if self.held[view] >= CAPACITY:
            self.flush(view)

    def _add(self, view: str, rows: Rows, group: Tensor, beside: Mapping[str, Tensor]) -> list[Rows]:
        """Adds rows whose samples stand in runs of a group, a run at a time, a few megabytes at a time.

        Returns a row a sample of each part, where the other view wants them.
        """
        needs = {need: sums for need, sums in self.sums.items() if need.view == view}
        step = max(1, min(CHUNK // max(1, rows.raw[:1].nbytes), TERMS // rows.raw.shape[2]))
        if view not in self.shift:
            self.shift[view] = rows.take(0, step).finite().pilot
        rows, means = rows.about(self.shift[view]), []
        for g, first, last in _runs(group):
            for a in range(first, last, step):
                b = min(a + step, last)
                part = self._finite(rows.take(a, b))
                for need, sums in needs.items():
                    value = self._value(need, part, {k: v[a:b] for k, v in beside.items()})
                    sums.add(value, g if len(sums.parts) > 1 else 0)
                if view == "positions" and "samples" in self.views:
                    means.append(self._to_samples(part))
        return means

    def _finite(self, rows: Rows) -> Rows:
        """Without rows that are not finite, which are counted."""
        finite = rows.finite()
        if finite is not rows:
            self.left_out += int(rows.n - finite.n)
        return finite

    def _value(self, need: Need, rows: Rows, beside: Mapping[str, Tensor]) -> Statistic:
        statistic = need.statistic
        if self.plan.sampled(need):
            rows = _sample(rows, beside["key"], self.plan.positions or 0, self.seed)
        if issubclass(statistic, Patches):
            return statistic.of(rows, geometry=self.site.layer.geometry)
        if need.target:
            return statistic.of(rows, beside[need.target].to(rows.raw.device))  # type: ignore[attr-defined]
        return statistic.of(rows)  # type: ignore[attr-defined]

    def _to_samples(self, rows: Rows) -> Rows:
        """A row a sample, in memory of its own: later operations may write into what a hook saw."""
        if self.site.port == "output*grad":
            return rows.sample_totals()
        return rows.sample_means().copy() if rows.raw.shape[2] == 1 else rows.sample_means()

    def _of_calls(self, calls: list[Rows]) -> Rows:
        """A row a sample of a module that is called several times in a forward pass."""
        raw = torch.stack([c.raw for c in calls])
        return Rows(raw.sum(0) if self.site.port == "output*grad" else raw.mean(0), calls[0].keep, calls[0].shift)


class Pass:
    """All sites' collectors, one batch after another."""

    def __init__(self, plan: Plan, seed: int = 0):
        self.plan = plan
        self.collectors = {site: Collector(site, plan, seed) for site in plan.sites()}
        self.samples = torch.zeros(plan.groups, dtype=torch.int64)  # in each group
        self.frame: Frame | None = None

    def begin(self, frame: Frame) -> None:
        self.frame = frame

    def see(self, site: Site, tensor: Tensor) -> None:
        if self.frame is None:
            raise RuntimeError(f"{site} shows rows before a batch began")
        self.collectors[site].see(tensor, self.frame)

    def end(self, logits: Tensor | None) -> None:
        """Ends a batch: targets are known, a row a sample is complete."""
        frame = self.frame
        assert frame is not None
        given = frame.kwargs.get("targets")
        z = None if logits is None else logits.detach()
        beside = {name: target_of(name, z, frame.labels, given) for name in self.plan.targets}
        with torch.no_grad():
            for collector in self.collectors.values():
                collector.end(frame, beside)
        self.samples += torch.bincount(frame.group, minlength=len(self.samples))
        self.frame = None

    def flush(self) -> None:
        with torch.no_grad():
            for collector in self.collectors.values():
                collector.flush()

    def state_dict(self) -> dict[str, Tensor]:
        """What was added so far, as plain tensors; rows that wait are added first."""
        self.flush()
        state = {f"{k}/{name}": t for k, c in enumerate(self.collectors.values()) for j, a in enumerate(c.sums.values())
                 for name, t in ((f"{j}/{n}", t) for n, t in a.state_dict().items())}
        left_out = torch.tensor([c.left_out for c in self.collectors.values()])
        return state | {"samples": self.samples, "left_out": left_out}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where a pass of the same plan was saved."""
        self.samples = state["samples"].clone()
        for k, c in enumerate(self.collectors.values()):
            c.left_out = int(state["left_out"][k])
            for j, a in enumerate(c.sums.values()):
                prefix = f"{k}/{j}/"
                a.load_state_dict({n[len(prefix):]: t for n, t in state.items() if n.startswith(prefix)})

    def sums(self) -> dict[tuple[str, Need], Accumulator]:
        """Every accumulator by layer and need; complete after ``flush``."""
        return {(site.layer.name, need): a for site, c in self.collectors.items() for need, a in c.sums.items()}


def _runs(group: Tensor) -> list[tuple[int, int, int]]:
    groups, counts = torch.unique_consecutive(group, return_counts=True)
    ends = counts.cumsum(0).tolist()
    return [(g, end - n, end) for g, n, end in zip(groups.tolist(), counts.tolist(), ends, strict=True)]


def _cat(parts: list[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    keep = None
    if any(p.keep is not None for p in parts):
        keep = torch.cat([p.raw.new_ones(len(p), p.raw.shape[2], dtype=torch.bool) if p.keep is None else p.keep for p in parts])
    return Rows(torch.cat([p.raw for p in parts]), keep, parts[0].shift, parts[0].grid)


def _sample(rows: Rows, keys: Tensor, count: int, seed: int) -> Rows:
    """A place drawn in each of ``count`` stretches of a sample's positions: the same ones in any batch, order or process."""
    samples, width, positions = rows.raw.shape
    if positions <= count:
        return rows
    edges = torch.arange(count + 1) * positions // count
    draw = mix(keys[:, None], torch.arange(count), seed) % (edges[1:] - edges[:-1])
    at = (edges[:-1] + draw).to(rows.raw.device)
    raw = rows.raw.gather(2, at[:, None, :].expand(samples, width, count))
    return Rows(raw, None if rows.keep is None else rows.keep.gather(1, at), rows.shift)
