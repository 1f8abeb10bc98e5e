"""One pass: what each site shows is cut by group of samples and added to the statistics that are wanted of it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .buffer import Buffer
from .frame import Frame
from .hooks import Site
from .keys import mix
from .linalg import exact_products
from .metrics import Need
from .plan import CAPACITY, PAIRS, Plan
from .rows import FAR, Rows, SampleSums
from .statistics import Accumulator, Maps, Patches, Statistic
from .targets import target_of

CHUNK = 2 << 20  # bytes of rows that one round of reductions reads: they stay in the cache
SAMPLES = 64  # of a group, whose maps are added up before patches are read from them
TERMS = 8192  # rows that one float32 product adds up: its rounding stays below what standard errors resolve


class Collector:
    """Adds what one site shows.

    Products of units are formed while the rows pass, a group's at a time. Everything else is made of sums over a sample's
    positions, which wait with the samples until there are enough for one round over the groups.
    """

    def __init__(self, site: Site, plan: Plan, seed: int = 0):
        self.site, self.plan, self.seed = site, plan, seed
        layer = site.layer
        here = [need for need in plan.needs(layer) if need.port == site.port]
        self.sums = {need: Accumulator(need.statistic, plan.groups_of(layer, need)) for need in here}
        self.views = {need.view for need in here}
        positions = [need for need in here if need.view == "positions"]
        tables = {need: "squares" if self._of_features(need) else need.statistic.by_sample for need in positions}
        self.whole = [need for need, table in tables.items() if table is None]
        self.reduced = [need for need, table in tables.items() if table is not None]
        self.tables = {table for table in tables.values() if table is not None}
        self.shift: dict[str, tuple[Tensor, bool]] = {}
        self.waiting: dict[str, Buffer] = {}
        self.grid: tuple[int, ...] = ()
        self.maps: Maps | None = None
        self.reader: Need | None = None
        self.means: list[Rows] = []  # of the batch that passes, one a call
        self.left_out = 0

    def _of_features(self, need: Need) -> bool:
        """Whether a layer reads its input's features as they are, not patches of them."""
        return issubclass(need.statistic, Patches) and self.site.layer.geometry is None

    def see(self, tensor: Tensor, frame: Frame) -> None:
        """Takes what passes: a tensor with the samples of the frame."""
        rows = self.site.layer.rows(tensor.double() if self.plan.precision == "float64" else tensor, len(frame))
        samples, width, positions = rows.raw.shape
        if frame.mask is not None and frame.mask.shape == (samples, positions):
            rows = Rows(rows.raw, frame.mask, rows.shift, rows.grid)
        rows = rows.about(torch.zeros(width, dtype=torch.float64, device=tensor.device), moved=False)
        runs = frame.group.unique_consecutive().numel()
        if "positions" not in self.views:
            self.means.append(self._to_samples(self._finite(rows)))
        elif samples * positions >= self.plan.groups * width and runs <= 2 * self.plan.groups:
            sums = self._digest(rows, frame.group, frame.keys)
            if self.reduced:
                self._wait("sums", frame.group, sums.tables())
            self.means += [self._of_sums(sums)] if "samples" in self.views else []
        else:
            self._wait_whole(rows, frame)
            self.means += [self._to_samples(rows.finite())] if "samples" in self.views else []

    def end(self, frame: Frame, beside: Mapping[str, Tensor]) -> None:
        """Takes what stands beside the batch's samples: labels, targets."""
        if self.means:
            calls, self.means = self.means, []
            rows = calls[0] if len(calls) == 1 else self._of_calls(calls)
            self._wait("samples", frame.group, {"raw": rows.raw[:, :, 0], "keep": rows.mask()[:, 0], **beside})

    def flush(self) -> None:
        """Adds what still waits."""
        for kind in self.waiting:
            self._empty(kind)
        self._read_maps()

    def _wait_whole(self, rows: Rows, frame: Frame) -> None:
        if self.site.layer.geometry is not None and rows.grid != self.grid and "rows" in self.waiting:
            self._empty("rows")  # maps of another size are read apart
        self.grid = rows.grid
        self._wait("rows", frame.group, {"raw": rows.raw, "keep": rows.mask(), "key": frame.keys})

    def _wait(self, kind: str, group: Tensor, tables: dict[str, Tensor]) -> None:
        positions = tables["raw"].shape[2] if kind == "rows" else 1
        if kind not in self.waiting:
            self.waiting[kind] = Buffer(max(1, CAPACITY[kind] // positions))
        buffer, tables = self.waiting[kind], {"group": group, **tables}
        if not buffer.fits(**tables):
            self._empty(kind)
        buffer.put(**tables)
        if buffer.full:
            self._empty(kind)

    def _empty(self, kind: str) -> None:
        """Adds what waits of one kind, its samples sorted by group."""
        held = self.waiting[kind].take()
        group = held.pop("group")
        if not len(group):
            return
        order = torch.argsort(group, stable=True)
        held, group = {k: t[order.to(t.device)] for k, t in held.items()}, group[order]
        if kind == "sums":
            self._add_reduced(SampleSums.of_tables(held, self.shift["positions"][0]), group)
            return
        raw, keep = held.pop("raw"), held.pop("keep")
        if kind == "rows":
            rows = Rows(raw, None if bool(keep.all()) else keep, raw.new_zeros(raw.shape[1]).double(), self.grid, False)
            self._add_reduced(self._digest(rows, group, held["key"]), group)
        else:
            self._add_samples(Rows(raw[:, :, None], None if bool(keep.all()) else keep[:, None]), group, held)

    def _digest(self, rows: Rows, group: Tensor, keys: Tensor) -> SampleSums:
        """Adds products of rows whose samples stand in runs of a group, a few megabytes at a time; the rest as sums."""
        step = max(1, CHUNK // max(1, rows.raw[:1].nbytes))
        rows, parts = rows.about(*self._shift("positions", rows.take(0, step))), []
        longest = min(step, max(1, TERMS // rows.raw.shape[2]))
        drawn = _draw(keys, rows.raw.shape[2], self.plan.positions, self.seed) if self.plan.positions and self.whole else None
        only_maps = not self.tables and "samples" not in self.views and all(issubclass(n.statistic, Patches) for n in self.whole)
        with exact_products():
            for first, last, runs in _chunks(_runs(group, longest) if self.whole else [], len(rows), step):
                part = rows.take(first, last)
                if not only_maps:
                    part = self._finite(part)
                    parts.append(part.by_sample(*self.tables))
                for g, a, b in runs:
                    self._form(g, part.take(a - first, b - first), None if drawn is None else drawn[a:b])
        return SampleSums.cat(parts) if parts else rows.take(0, 0).by_sample()

    def _form(self, group: int, rows: Rows, drawn: Tensor | None) -> None:
        """Forms what rows of one group are needed whole for, or at the positions drawn."""
        for need in self.whole:
            if issubclass(need.statistic, Patches):
                self._add_maps(need, group, rows)
            else:
                some = rows if drawn is None or not self.plan.sampled(need) else rows.at(drawn)
                self._put(need, group, need.statistic.of(some))  # type: ignore[attr-defined]

    def _add_maps(self, need: Need, group: int, rows: Rows) -> None:
        """Takes in samples of a convolution's input; images of another size begin anew."""
        if self.maps is None or self.maps.grid != rows.grid:
            self._read_maps()
            self.maps, self.reader = Maps(self.plan.groups, rows, self.site.layer.geometry), need  # type: ignore[arg-type]
        self.left_out += self.maps.add(rows, group)
        if sum(self.maps.samples) >= SAMPLES * len(self.maps.samples):
            self._read_maps()

    def _read_maps(self) -> None:
        if self.maps is not None and self.reader is not None:
            for group, value in self.maps.read().items():
                self._put(self.reader, group, value)

    def _add_reduced(self, sums: SampleSums, group: Tensor) -> None:
        for g, a, b in _runs(group) if self.reduced else ():
            part = sums.map(lambda t, a=a, b=b: t[a:b])  # type: ignore[misc]
            for need in self.reduced:
                self._put(need, g, need.statistic.of(part))  # type: ignore[attr-defined]

    def _add_samples(self, rows: Rows, group: Tensor, beside: Mapping[str, Tensor]) -> None:
        """A row a sample. There are few: double precision costs little, and standard errors are differences."""
        rows = Rows(rows.raw.double(), rows.keep)
        rows = rows.about(*self._shift("samples", rows))
        for g, a, b in _runs(group):
            part = rows.take(a, b).finite()
            for need in self.sums:
                if need.view == "samples":
                    target = [beside[need.target][a:b].to(rows.raw.device)] if need.target else []
                    geometry = {"geometry": self.site.layer.geometry} if issubclass(need.statistic, Patches) else {}
                    self._put(need, g, need.statistic.of(part, *target, **geometry))  # type: ignore[attr-defined]

    def _put(self, need: Need, group: int, value: Statistic) -> None:
        sums = self.sums[need]
        sums.add(value, group if len(sums.parts) > 1 else 0)

    def _shift(self, view: str, first: Rows) -> tuple[Tensor, bool]:
        if view not in self.shift:
            long = any(need.view == view and need.statistic in PAIRS for need in self.sums)
            # without products only sums of a few hundred samples are formed in float32: a far mean costs less there
            pilot = first.finite().pilot(FAR if long else 8 * FAR)
            self.shift[view] = pilot, bool(pilot.any())
        return self.shift[view]

    def _finite(self, rows: Rows) -> Rows:
        """Without rows that are not finite, which are counted."""
        finite = rows.finite()
        if finite is not rows:
            self.left_out += int(rows.n - finite.n)
        return finite

    def _to_samples(self, rows: Rows) -> Rows:
        """A row a sample, in memory of its own: later operations may write into what a hook saw."""
        if self.site.port == "output*grad":
            return rows.sample_totals()
        return rows.copy() if rows.raw.shape[2] == 1 else rows.sample_means()

    def _of_sums(self, sums: SampleSums) -> Rows:
        return sums.totals() if self.site.port == "output*grad" else sums.means()

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
        z = None if logits is None else logits.detach()
        beside = {name: target_of(name, z, frame.labels, frame.targets) for name in self.plan.targets}
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


def _runs(group: Tensor, step: int = 1 << 60) -> list[tuple[int, int, int]]:
    """(group, first, last) of each run of samples of one group, in order, none longer than ``step``."""
    groups, counts = torch.unique_consecutive(group, return_counts=True)
    ends = counts.cumsum(0).tolist()
    runs = zip(groups.tolist(), counts.tolist(), ends, strict=True)
    return [(g, a, min(a + step, end)) for g, n, end in runs for a in range(end - n, end, step)]


def _chunks(runs: list[tuple[int, int, int]], samples: int, step: int) -> list[tuple[int, int, list[tuple[int, int, int]]]]:
    """(first, last, runs) of neighbouring runs, as many as ``step`` samples hold; without runs, stretches of samples."""
    if not runs:
        return [(a, min(a + step, samples), []) for a in range(0, samples, step)]
    chunks: list[tuple[int, int, list[tuple[int, int, int]]]] = []
    for g, a, b in runs:
        if chunks and b - chunks[-1][0] <= step:
            first, _, held = chunks.pop()
            chunks.append((first, b, [*held, (g, a, b)]))
        else:
            chunks.append((a, b, [(g, a, b)]))
    return chunks


def _draw(keys: Tensor, positions: int, count: int, seed: int) -> Tensor | None:
    """A place in each of ``count`` stretches of a sample's positions, (samples, count): the same in any batch or process.

    None where there are no more positions than that.
    """
    if positions <= count:
        return None
    edges = torch.arange(count + 1) * positions // count
    return edges[:-1] + mix(keys[:, None], torch.arange(count), seed) % (edges[1:] - edges[:-1])
