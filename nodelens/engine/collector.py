"""Collectors: add the rows of one site, by group of samples, to the statistics that the plan needs there."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nodelens.metrics import Need
from nodelens.metrics.need import Other
from nodelens.network.batch import Batch
from nodelens.network.hooks import Site
from nodelens.network.missing import with_target
from nodelens.network.targets import target_of
from nodelens.statistics import Accumulator, Statistic
from nodelens.statistics.buffer import Buffer
from nodelens.statistics.costs import PAIRS
from nodelens.statistics.gram import TERMS, Gram, MapGrams
from nodelens.statistics.group_slices import chunks_of, copy_order, draw, group_slices, sorting, taken
from nodelens.statistics.linalg import exact_products
from nodelens.statistics.patches import MapSums, patch_sums
from nodelens.statistics.rows import FAR, Rows, means_of, totals_of
from nodelens.statistics.sample_sums import SampleParts, SampleSums

from .buffered import CAPACITY, MAX_BYTES, buffer_rows, bytes_of
from .captured_rows import CHUNK, captured_rows
from .plan import Plan

SAMPLES = 64  # per group: maps are summed over this many before patches are read from the sum


class Collector:
    """Adds the rows of one site to its statistics.

    Products of units are added batch by batch and group by group. All other statistics are computed from each sample's sums over
    positions, which are buffered until there are enough samples for one round over the groups.
    """

    def __init__(self, site: Site, plan: Plan, seed: int = 0):
        self.site, self.plan, self.seed = site, plan, seed
        layer = site.layer
        here = [need for need in plan.needs(layer) if need.port == site.port]
        self.sums = {need: Accumulator(need.statistic, plan.groups_of(layer, need)) for need in here}
        rows = [need for need in here if need.view == "positions" and not isinstance(need.target, Other)]
        from_patches = [need for need in rows if need.statistic.entries and layer.geometry is not None]
        by_sample = any(need.target for need in from_patches)  # sums of each sample's entries add to those of all
        self.entries = from_patches if by_sample else []
        self.patches = None if by_sample else next(iter(from_patches), None)
        self.maps: MapSums | None = None
        others = [need for need in rows if need not in from_patches]
        self.products = [need for need in others if need.statistic.by_sample is None]
        self.only_grams = plan.positions is None and {need.statistic for need in self.products} == {Gram}
        self.reduced = [need for need in others if need.statistic.by_sample is not None]
        self.tables = {need.statistic.by_sample for need in self.reduced} - {None}
        self.whole_rows = {name for need in self.products for name in need.statistic.by_row} if plan.positions is None else set()
        self.by_sample = [need for need in here if need.view == "samples"]
        self.by_token = [need for need in here if need.view == "tokens"]
        self.targets = list(dict.fromkeys(need.target for need in self.by_sample if need.target))
        self.needs_means = bool(self.by_sample) or Other(layer.name, site.port) in plan.others
        self.labelled = any(need.target for need in rows)
        read_whole = self.products or self.patches or self.entries or self.needs_means or self.by_token or len(here) > len(rows)
        self.only_reduced = bool(self.reduced) and not read_whole
        self.shift: dict[str, tuple[Tensor, bool]] = {}
        self.buffers: dict[Any, Buffer] = {}  # by kind
        self.grid: tuple[int, ...] = ()
        self.means: list[Rows] = []  # of the current batch, one entry per call of the module
        self.unread = ""  # why no rows could be made of what the site showed
        self.left_out = 0  # rows that are not finite, of ``rows_seen``
        self.rows_seen = torch.zeros(1, dtype=torch.int64)
        self.lost = torch.zeros(plan.groups, dtype=torch.int64)  # samples of each group with rows, none of which is finite

    def rows_of(self, tensor: Tensor, batch: Batch) -> Rows:
        """The rows of a captured tensor."""
        return captured_rows(self.site, self.plan, tensor, batch, by_chunk=self.only_reduced)

    def see(self, rows: Rows, batch: Batch) -> None:
        """Takes the rows of one batch: adds a large batch directly and buffers a small one."""
        label = self._labels(batch)
        if not (self.products or self.reduced or self.entries or self.patches):
            self.means += [self._to_samples(self._finite(rows, batch.group))] if self.needs_means else []
        elif self._large_enough(rows):
            sums, order = self._process_rows(rows, batch.group, batch.hashes, label)
            if self.reduced:
                ordered = {k: taken(t, order) for k, t in {"group": batch.group, **label}.items()}
                self._buffer("sums", **sums.tables(), **ordered)
            back = None if order is None else order.argsort()
            per_sample = totals_of if "grad" in self.site.port else means_of
            self.means += [per_sample(sums.map(lambda t: taken(t, back)))] if self.needs_means else []
        else:
            self._buffer_rows(rows, batch, label)
            self.means += [self._to_samples(rows.finite())] if self.needs_means else []

    def _large_enough(self, rows: Rows) -> bool:
        """Whether a batch is added without buffering: it fills one product per group, if any, or exceeds the buffer's bytes."""
        samples, width, positions = rows.raw.shape
        return not self.products or samples * positions >= self.plan.groups * width or rows.raw.nbytes >= MAX_BYTES

    def _labels(self, batch: Batch) -> dict[str, Tensor]:
        return {"label": target_of("label", None, batch.labels)} if self.labelled else {}

    def close(self) -> Rows | None:
        """The batch's rows, one per sample. Over several calls of a module, gradients are summed and outputs averaged."""
        calls, self.means = self.means, []
        if len(calls) < 2:
            return calls[0] if calls else None
        raw = torch.stack([c.raw for c in calls])
        return Rows(raw.sum(0) if "grad" in self.site.port else raw.mean(0), calls[0].keep, calls[0].shift)

    def end(self, rows: Rows | None, batch: Batch, targets: Mapping[Any, Tensor]) -> None:
        """Buffers the per-sample rows of a complete batch, together with their paired targets."""
        if rows is not None and self.by_sample:
            tables = {f"target{k}": targets[target] for k, target in enumerate(self.targets)}
            hashes = {"hash": batch.hashes} if any(need.statistic.takes_hashes for need in self.by_sample) else {}
            self._buffer("samples", group=batch.group, raw=rows.raw[:, :, 0], keep=rows.mask()[:, 0], **tables, **hashes)

    def flush(self) -> None:
        """Adds all buffered rows."""
        for kind in CAPACITY:  # in this order: processing rows fills the buffers of sums and entries
            if kind in self.buffers:
                self._process_buffer(kind)
        self._read_maps()

    def _buffer_rows(self, rows: Rows, batch: Batch, label: dict[str, Tensor]) -> None:
        if rows.grid != self.grid and "rows" in self.buffers:
            self._process_buffer("rows")  # maps of different sizes cannot share a buffer
        self.grid = rows.grid
        self._buffer("rows", group=batch.group, raw=rows.raw, keep=rows.mask(), hash=batch.hashes, **label)

    def _buffer(self, kind: Any, **tables: Tensor) -> None:
        if kind not in self.buffers:
            self.buffers[kind] = Buffer(self._capacity(kind, tables))
        buffer = self.buffers[kind]
        if not buffer.fits(**tables):
            self._process_buffer(kind)
        buffer.put(**tables)
        if buffer.full:
            self._process_buffer(kind)

    def _capacity(self, kind: Any, tables: dict[str, Tensor]) -> int:
        return buffer_rows(kind, bytes_of(tables), tables["raw"].shape[2] if kind == "rows" else 1)

    def _process_buffer(self, kind: Any) -> None:
        """Empties one kind of buffer into the sums."""
        tables = self.buffers[kind].take()
        group = tables.pop("group")
        if len(group):
            self._add_rows(tables, group) if kind == "rows" else self._add_tables(kind, tables, group)

    def _add_tables(self, kind: str, tables: dict[str, Tensor], group: Tensor) -> None:
        """Adds buffered values, one for each sample, sorted by group."""
        order = sorting(group)
        tables, group = {k: taken(t, order) for k, t in tables.items()}, taken(group, order)
        if kind == "samples":
            raw, keep = tables.pop("raw"), tables.pop("keep")
            self._add_samples(Rows(raw[:, :, None], None if bool(keep.all()) else keep[:, None]), group, tables)
            return
        label = {"label": tables.pop("label")} if "label" in tables else {}
        shift = self.shift["positions"]
        if kind == "entries":  # the same tensor each time, so that sums are added in place
            per_unit = tables["sums"].shape[1] // len(shift[0])
            shift = self.shift.setdefault(kind, (shift[0].repeat_interleave(per_unit), shift[1]))
        self._add_sums(self.reduced if kind == "sums" else self.entries, SampleSums.of_tables(tables, shift[0]), group, label)

    def _add_rows(self, tables: dict[str, Tensor], group: Tensor) -> None:
        """Adds buffered rows."""
        raw, keep, hashes = (tables.pop(name) for name in ("raw", "keep", "hash"))
        rows = Rows(raw, None if bool(keep.all()) else keep, raw.new_zeros(raw.shape[1]).double(), self.grid, False)
        sums, done = self._process_rows(rows, group, hashes, tables)
        order = sorting(group) if done is None else done
        sums = sums.map(lambda t: taken(t, order)) if done is None and self.reduced else sums
        self._add_sums(self.reduced, sums, taken(group, order), {k: taken(t, order) for k, t in tables.items()})

    def _process_rows(
        self, rows: Rows, group: Tensor, hashes: Tensor, label: dict[str, Tensor]
    ) -> tuple[SampleSums, Tensor | None]:
        """Adds products of rows by group, in cache-sized chunks; returns the sums of each sample for the rest, and their order."""
        _, width, positions = rows.raw.shape
        fill = width // max(1, positions) if self.products else 1  # fewer rows than units take longer to add than to multiply
        step = max(1, CHUNK // max(1, rows.raw[:1].nbytes), fill)
        rows, parts = rows.about(*self._shift("positions", rows.take(0, step))), SampleParts(len(rows))
        longest = min(step, max(1, TERMS // rows.raw.shape[2]))
        grams = MapGrams() if self.only_grams and MapGrams.fits(rows) else None
        by_slice = [] if grams else self.products
        order = copy_order(rows.raw, group) if by_slice else None
        group, hashes, label = taken(group, order), taken(hashes, order), {k: taken(t, order) for k, t in label.items()}
        draws = self.plan.positions and self.products
        keep = rows.keep if order is None or rows.keep is None else rows.keep[order]
        drawn = draw(hashes, keep, rows.raw.shape[2], self.plan.positions, self.seed) if draws else None  # type: ignore[arg-type]
        only_entries = not self.tables and not self.products and not self.needs_means
        wanted: set[Any] = set() if only_entries else {"sums", *self.tables, *self.whole_rows}
        with exact_products():
            for first, last, slices in chunks_of(group_slices(group, longest) if by_slice else [], len(rows), step):
                part = rows.take(first, last) if order is None else rows
                part = part.prepared(wanted, None if order is None else order[first:last])
                if self.entries:
                    self._buffer_patches(part, group[first:last], {k: t[first:last] for k, t in label.items()}, only_entries)
                if self.patches:
                    self._add_maps(part, group[first:last], only_entries)
                if not only_entries:
                    part = self._finite(part, group[first:last])
                    parts.append(part.by_sample(*self.tables))  # type: ignore[arg-type]
                if grams:
                    grams.add(part, group[first:last].tolist())
                for g, a, b in slices:
                    self._add_products(g, part.take(a - first, b - first), None if drawn is None else drawn[a:b])
        sums = parts.joined() or rows.take(0, 0).by_sample()
        for g, value in grams.read(sums, group, rows).items() if grams else ():
            for need in self.products:
                self.put(need, g, value)
        return sums, order

    def _buffer_patches(self, rows: Rows, group: Tensor, label: dict[str, Tensor], count: bool) -> None:
        """Buffers the sums over a convolution's patches, per sample."""
        assert self.site.layer.geometry is not None
        sums = patch_sums(rows, self.site.layer.geometry)
        if count:
            self._count(rows, group, sums.masked)
        self._buffer("entries", group=group, **sums.tables(), **label)

    def _add_maps(self, rows: Rows, group: Tensor, count: bool) -> None:
        """Adds samples of a convolution's input to the sums of maps, which are restarted if the image size changes."""
        if self.maps is None or self.maps.grid != rows.grid:
            self._read_maps()
            assert self.site.layer.geometry is not None
            self.maps = MapSums(self.plan.groups, rows, self.site.layer.geometry)
        dropped = self.maps.add(rows, group)
        if count:
            self._count(rows, group, bool(dropped.any()))
        if sum(self.maps.samples) >= SAMPLES * len(self.maps.samples):
            self._read_maps()

    def _read_maps(self) -> None:
        if self.maps is not None and self.patches is not None:
            for group, value in self.maps.read().items():
                self.put(self.patches, group, value)

    def _add_products(self, group: int, rows: Rows, drawn: Tensor | None) -> None:
        """Adds rows of one group to the statistics that need whole rows, or those at the positions drawn."""
        for need in self.products:
            chosen = rows if drawn is None or not self.plan.sampled(need) else rows.at(drawn)
            self.sums[need].add_rows(chosen, group if len(self.sums[need].parts) > 1 else 0)

    def _add_sums(self, needs: list[Need], sums: SampleSums, group: Tensor, label: dict[str, Tensor]) -> None:
        for g, a, b in group_slices(group) if needs else ():
            part = sums.map(lambda t, a=a, b=b: t[a:b])  # type: ignore[misc]
            for need in needs:
                target = [label["label"][a:b]] if need.target else []
                self.sums[need].add_rows(part, g if len(self.sums[need].parts) > 1 else 0, *target)

    def _add_samples(self, rows: Rows, group: Tensor, tables: Mapping[str, Tensor]) -> None:
        """Adds one row per sample, in float64: there are few rows, and standard errors are small differences."""
        rows = Rows(rows.raw.double(), rows.keep)
        rows = rows.about(*self._shift("samples", rows))
        for g, a, b in group_slices(group):
            part = rows.take(a, b).finite()
            targets = {t: tables[f"target{k}"][a:b].to(rows.raw.device) for k, t in enumerate(self.targets)}
            chosen = {t: part.only(with_target(t, z)) for t, z in targets.items()} | {None: part}
            made: dict[tuple[Any, ...], Statistic] = {}
            for need in self.by_sample:
                paired = [targets[need.target]] if need.target and need.statistic.paired() else []
                hashes = {"hashes": tables["hash"][a:b]} if need.statistic.takes_hashes else {}
                key = need.statistic, need.target if paired else None, id(chosen[need.target])  # once where all have a target
                if key not in made:
                    made[key] = need.statistic.of(chosen[need.target], *paired, **hashes)  # type: ignore[attr-defined]
                self.put(need, g, made[key])

    def put(self, need: Need, group: int, value: Statistic) -> None:
        """Adds a value to the sum of its group, or to the only sum."""
        sums = self.sums[need]
        sums.add(value, group if len(sums.parts) > 1 else 0)

    def _shift(self, view: str, first: Rows) -> tuple[Tensor, bool]:
        if view not in self.shift:
            products = any(need.view == view and need.statistic in PAIRS for need in self.sums)
            # without products, float32 sums cover only a few hundred samples, so a distant mean costs less precision
            pilot = first.finite().pilot(FAR if products else 8 * FAR)
            self.shift[view] = pilot, bool(pilot.any())
        return self.shift[view]

    def only_finite(self, rows: Rows) -> Rows:
        """The finite rows; counts the others only if no other reduction of this site counts them."""
        alone = not (self.products or self.reduced or self.entries or self.patches or self.needs_means)
        return self._finite(rows, None) if alone else rows.finite()

    def _count(self, rows: Rows, group: Tensor, masked: bool) -> None:
        """Counts the rows of samples that are left out with the first of their rows that is not finite."""
        if masked:
            self._finite(rows, group, complete=True)
        else:
            self.rows_seen = self.rows_seen.to(rows.n.device) + rows.n

    def _finite(self, rows: Rows, group: Tensor | None, complete: bool = False) -> Rows:
        """The finite rows; counts the others in ``left_out``, and in ``lost`` the samples without a row that is left.

        ``complete``: a sample is lost with the first of its rows. group (samples,), None where rows are not those of samples.
        """
        finite = rows.finite()
        self.rows_seen = self.rows_seen.to(rows.n.device) + rows.n
        left_out = 0 if finite is rows else int(rows.n - finite.n)
        if left_out:
            self.left_out += left_out
        if left_out and group is not None:
            lost = finite.counts < rows.counts if complete else (finite.counts == 0) & (rows.counts > 0)
            self.lost += torch.bincount(group[lost[:, 0].cpu()], minlength=len(self.lost))
        return finite

    def _to_samples(self, rows: Rows) -> Rows:
        """One row per sample, copied, because later operations may write into the captured tensor."""
        if "grad" in self.site.port:
            return rows.sample_totals()
        return rows.copy() if rows.raw.shape[2] == 1 else rows.sample_means()
