"""What one site shows, cut by group of samples and added to the statistics that are wanted of it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nodelens.metrics import Need
from nodelens.metrics.need import Other
from nodelens.network.batch import Batch
from nodelens.network.group_layer import GroupLayer
from nodelens.network.hooks import Site
from nodelens.network.layers import Layer
from nodelens.network.targets import target_of
from nodelens.statistics import Accumulator, Statistic
from nodelens.statistics.buffer import Buffer
from nodelens.statistics.costs import PAIRS
from nodelens.statistics.group_slices import chunks_of, draw, group_slices
from nodelens.statistics.linalg import exact_products
from nodelens.statistics.patches import MapSums, patch_sums
from nodelens.statistics.rows import FAR, Rows, SampleSums
from nodelens.statistics.weight_sums import WeightSums

from .buffered import CAPACITY, MOST, buffer_rows
from .plan import Plan

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
        rows = [need for need in here if need.view == "positions" and not isinstance(need.target, Other)]
        patchy = [need for need in rows if need.statistic.entries and layer.geometry is not None]
        self.entries = [need for need in patchy if need.target]
        self.patches = next((need for need in patchy if not need.target), None)
        self.maps: MapSums | None = None
        rest = [need for need in rows if need not in patchy]
        self.whole = [need for need in rest if need.statistic.by_sample is None]
        self.reduced = [need for need in rest if need.statistic.by_sample is not None]
        self.tables = {need.statistic.by_sample for need in self.reduced} - {None}
        self.by_sample = [need for need in here if need.view == "samples"]
        self.by_token = [need for need in here if need.view == "tokens"]
        self.targets = list(dict.fromkeys(need.target for need in self.by_sample if need.target))
        self.means_wanted = bool(self.by_sample) or Other(layer.name, site.port) in plan.others
        self.labelled = any(need.target for need in rows)
        self.shift: dict[str, tuple[Tensor, bool]] = {}
        self.waiting: dict[str, Buffer] = {}
        self.grid: tuple[int, ...] = ()
        self.means: list[Rows] = []  # of the batch that passes, one a call
        self.left_out = 0

    def rows_of(self, tensor: Tensor, batch: Batch) -> Rows:
        """What passes as rows, those of padded tokens left out; narrower ones where the port says so."""
        layer, samples = self.site.layer, len(batch)
        maps = isinstance(layer, GroupLayer) and self.site.port == "maps"
        rows = layer.maps(tensor, samples) if maps else layer.rows(tensor, samples, batch.mask)  # type: ignore[attr-defined]
        rows = rows.double() if self.plan.precision == "float64" else rows
        if "/tokens" in self.site.port:
            share = 1 / batch.tokens.clamp_min(1).to(rows.raw)
            rows = Rows(rows.raw * share[:, None, None], rows.keep, rows.shift, rows.grid)
        rows = self.plan.covariance.rows(rows, self.site.port)
        return rows.about(torch.zeros(rows.raw.shape[1], dtype=torch.float64, device=rows.raw.device), shifted=False)

    def see(self, rows: Rows, batch: Batch) -> None:
        """Takes the rows of a batch's samples."""
        label = self._labels(batch)
        if not (self.whole or self.reduced or self.entries or self.patches):
            self.means += [self._to_samples(self._finite(rows))] if self.means_wanted else []
        elif self._enough(rows) and len(group_slices(batch.group)) <= 2 * self.plan.groups:
            sums = self._digest(rows, batch.group, batch.hashes, label)
            if self.reduced:
                self._wait("sums", batch.group, sums.tables() | label)
            self.means += [self._of_sums(sums)] if self.means_wanted else []
        else:
            self._wait_whole(rows, batch, label)
            self.means += [self._to_samples(rows.finite())] if self.means_wanted else []

    def _enough(self, rows: Rows) -> bool:
        """Whether a batch needs no company: it has as many rows as products of a group want, or as would wait at all."""
        samples, width, positions = rows.raw.shape
        return samples * positions >= self.plan.groups * width or rows.raw.nbytes >= MOST

    def _labels(self, batch: Batch) -> dict[str, Tensor]:
        return {"label": target_of("label", None, batch.labels)} if self.labelled else {}

    def close(self) -> Rows | None:
        """The batch's rows a sample: of a module that is called several times, over its calls."""
        calls, self.means = self.means, []
        if len(calls) < 2:
            return calls[0] if calls else None
        raw = torch.stack([c.raw for c in calls])
        return Rows(raw.sum(0) if "grad" in self.site.port else raw.mean(0), calls[0].keep, calls[0].shift)

    def end(self, rows: Rows | None, batch: Batch, beside: Mapping[Any, Tensor]) -> None:
        """Takes the rows a sample of a batch that is complete, with what stands beside them."""
        if rows is not None and self.by_sample:
            tables = {f"beside{k}": beside[target] for k, target in enumerate(self.targets)}
            keys = {"key": batch.hashes} if any(need.statistic.takes_hashes for need in self.by_sample) else {}
            self._wait("samples", batch.group, {"raw": rows.raw[:, :, 0], "keep": rows.mask()[:, 0], **tables, **keys})

    def flush(self) -> None:
        """Adds what still waits."""
        for kind in CAPACITY:  # in this order: whole rows leave sums and entries behind
            if kind in self.waiting:
                self._empty(kind)
        self._read_maps()

    def _wait_whole(self, rows: Rows, batch: Batch, label: dict[str, Tensor]) -> None:
        if rows.grid != self.grid and "rows" in self.waiting:
            self._empty("rows")  # maps of another size are read apart
        self.grid = rows.grid
        self._wait("rows", batch.group, {"raw": rows.raw, "keep": rows.mask(), "key": batch.hashes, **label})

    def _wait(self, kind: str, group: Tensor, tables: dict[str, Tensor]) -> None:
        positions = tables["raw"].shape[2] if kind == "rows" else 1
        tables = {"group": group, **tables}
        if kind not in self.waiting:
            self.waiting[kind] = Buffer(buffer_rows(kind, sum(t[:1].nbytes for t in tables.values()), positions))
        buffer = self.waiting[kind]
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
        label = {"label": held.pop("label")} if "label" in held else {}
        if kind in ("sums", "entries"):
            shift = self.shift["positions"][0]
            per_unit = held["sums"].shape[1] // len(shift)
            sums = SampleSums.of_tables(held, shift.repeat_interleave(per_unit))
            self._add_sums(self.reduced if kind == "sums" else self.entries, sums, group, label)
            return
        raw, keep = held.pop("raw"), held.pop("keep")
        if kind == "rows":
            rows = Rows(raw, None if bool(keep.all()) else keep, raw.new_zeros(raw.shape[1]).double(), self.grid, False)
            self._add_sums(self.reduced, self._digest(rows, group, held["key"], label), group, label)
        else:
            self._add_samples(Rows(raw[:, :, None], None if bool(keep.all()) else keep[:, None]), group, held)

    def _digest(self, rows: Rows, group: Tensor, keys: Tensor, label: dict[str, Tensor]) -> SampleSums:
        """Adds products of rows whose samples stand in runs of a group, a few megabytes at a time; the rest as sums."""
        step = max(1, CHUNK // max(1, rows.raw[:1].nbytes))
        rows, parts = rows.about(*self._shift("positions", rows.take(0, step))), []
        longest = min(step, max(1, TERMS // rows.raw.shape[2]))
        by_run = bool(self.whole or self.patches)
        wanted = self.plan.positions and self.whole
        drawn = draw(keys, rows.keep, rows.raw.shape[2], self.plan.positions, self.seed) if wanted else None  # type: ignore[arg-type]
        only_entries = not self.tables and not self.whole and not self.means_wanted
        with exact_products():
            for first, last, runs in chunks_of(group_slices(group, longest) if by_run else [], len(rows), step):
                part = rows.take(first, last)
                if self.entries:
                    self._read(part, group[first:last], {k: t[first:last] for k, t in label.items()}, only_entries)
                for g, a, b in runs if self.patches else ():
                    self._add_maps(g, part.take(a - first, b - first), only_entries and not self.entries)
                if not only_entries:
                    part = self._finite(part)
                    parts.append(part.by_sample(*self.tables))  # type: ignore[arg-type]
                for g, a, b in runs if self.whole else ():
                    self._form(g, part.take(a - first, b - first), None if drawn is None else drawn[a:b])
        return SampleSums.cat(parts) if parts else rows.take(0, 0).by_sample()

    def _read(self, rows: Rows, group: Tensor, label: dict[str, Tensor], count: bool) -> None:
        """Adds up what a convolution reads of each sample."""
        assert self.site.layer.geometry is not None
        sums = patch_sums(rows, self.site.layer.geometry)
        if count and sums.masked:
            self._finite(rows)
        self._wait("entries", group, sums.tables() | label)

    def _add_maps(self, group: int, rows: Rows, count: bool) -> None:
        """Takes in samples of a convolution's input; images of another size begin anew."""
        if self.maps is None or self.maps.grid != rows.grid:
            self._read_maps()
            assert self.site.layer.geometry is not None
            self.maps = MapSums(self.plan.groups, rows, self.site.layer.geometry)
        lost = self.maps.add(rows, group)
        self.left_out += lost if count else 0
        if sum(self.maps.samples) >= SAMPLES * len(self.maps.samples):
            self._read_maps()

    def _read_maps(self) -> None:
        if self.maps is not None and self.patches is not None:
            for group, value in self.maps.read().items():
                self.put(self.patches, group, value)

    def _form(self, group: int, rows: Rows, drawn: Tensor | None) -> None:
        """Forms what rows of one group are needed whole for, or at the positions drawn."""
        for need in self.whole:
            some = rows if drawn is None or not self.plan.sampled(need) else rows.at(drawn)
            sums = self.sums[need]
            sums.add_rows(some, group if len(sums.parts) > 1 else 0)

    def _add_sums(self, needs: list[Need], sums: SampleSums, group: Tensor, label: dict[str, Tensor]) -> None:
        for g, a, b in group_slices(group) if needs else ():
            part = sums.map(lambda t, a=a, b=b: t[a:b])  # type: ignore[misc]
            for need in needs:
                target = [label["label"][a:b]] if need.target else []
                self.put(need, g, need.statistic.of(part, *target))  # type: ignore[attr-defined]

    def _add_samples(self, rows: Rows, group: Tensor, held: Mapping[str, Tensor]) -> None:
        """A row a sample. There are few: double precision costs little, and standard errors are differences."""
        rows = Rows(rows.raw.double(), rows.keep)
        rows = rows.about(*self._shift("samples", rows))
        for g, a, b in group_slices(group):
            part = rows.take(a, b).finite()
            for need in self.by_sample:
                beside = [held[f"beside{self.targets.index(need.target)}"][a:b].to(rows.raw.device)] if need.target else []
                keys = {"hashes": held["key"][a:b]} if need.statistic.takes_hashes else {}
                self.put(need, g, need.statistic.of(part, *beside, **keys))  # type: ignore[attr-defined]

    def put(self, need: Need, group: int, value: Statistic) -> None:
        """Adds a value to its group's, or to the one that there is."""
        sums = self.sums[need]
        sums.add(value, group if len(sums.parts) > 1 else 0)

    def _shift(self, view: str, first: Rows) -> tuple[Tensor, bool]:
        if view not in self.shift:
            long = any(need.view == view and need.statistic in PAIRS for need in self.sums)
            # without products only sums of a few hundred samples are formed in float32: a far mean costs less there
            pilot = first.finite().pilot(FAR if long else 8 * FAR)
            self.shift[view] = pilot, bool(pilot.any())
        return self.shift[view]

    def only_finite(self, rows: Rows) -> Rows:
        """Without rows that are not finite, which are counted where nothing else reads them."""
        alone = not (self.whole or self.reduced or self.entries or self.patches or self.means_wanted)
        return self._finite(rows) if alone else rows.finite()

    def _finite(self, rows: Rows) -> Rows:
        """Without rows that are not finite, which are counted."""
        finite = rows.finite()
        if finite is not rows:
            self.left_out += int(rows.n - finite.n)
        return finite

    def _to_samples(self, rows: Rows) -> Rows:
        """A row a sample, in memory of its own: later operations may write into what a hook saw."""
        if "grad" in self.site.port:
            return rows.sample_totals()
        return rows.copy() if rows.raw.shape[2] == 1 else rows.sample_means()

    def _of_sums(self, sums: SampleSums) -> Rows:
        return sums.totals() if "grad" in self.site.port else sums.means()


class WeightCollector(Collector):
    """Adds what a layer reads times what it puts out, and times its gradient: sums in the shape of its weights."""

    def rows_of(self, shown: Any, batch: Batch) -> Any:
        """Input, output and gradient, as they are."""
        return shown

    def see(self, shown: Any, batch: Batch) -> None:
        """Takes the input, output and gradient of a batch's samples."""
        for g, a, b in group_slices(batch.group):
            keep = None if batch.mask is None else batch.mask[a:b].flatten()
            x, y, gradient = (t[a:b] for t in shown)
            for need in self.sums:
                self.put(need, g, weight_sums(self.site.layer, x, y, gradient, keep))


class ModelCollector(Collector):
    """Holds what is added up over the whole model: the gradients of weights, a copy in training, products with supernodes."""

    def __init__(self, site: Site, plan: Plan, seed: int = 0):
        self.site, self.plan, self.seed, self.left_out, self.by_token = site, plan, seed, 0, []
        model, groups = site.layer.module, plan.members.groups
        self.sums = {need: need.statistic(model, groups, *need.options) for need in plan.needs(site.layer)}  # type: ignore[call-arg,misc]

    def close(self) -> Rows | None:
        """No rows: these sums see whole batches."""
        return None

    def end(self, rows: Rows | None, batch: Batch, beside: Mapping[Any, Tensor]) -> None:
        """Nothing waits."""

    def flush(self) -> None:
        """Nothing waits."""


def weight_sums(layer: Layer, x: Tensor, y: Tensor, gradient: Tensor, keep: Tensor | None = None) -> WeightSums:
    """The statistic of one batch of a layer's input, output and gradient."""
    out, slope = (layer.rows(t, len(t)).raw.transpose(1, 2).flatten(0, 1) for t in (y, gradient))
    read = layer.patches(x)
    keep = keep if keep is not None and len(keep) == len(read) else None
    return WeightSums.of(read, out, slope, keep, groups=getattr(layer.module, "groups", 1))
