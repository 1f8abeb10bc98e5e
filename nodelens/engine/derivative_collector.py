"""The collectors of derivatives: they add products of vectors at the units of a layer, or of all layers side by side."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nodelens.metrics import Need
from nodelens.network.batch import Batch
from nodelens.network.hooks import Site
from nodelens.network.random_vectors import rows_of_tokens
from nodelens.network.streams import side_of
from nodelens.network.traced import Traced
from nodelens.statistics.group_slices import draw, group_slices, sorting
from nodelens.statistics.products import Fold, Products, about_zero
from nodelens.statistics.rows import Rows

from .association_methods import BUFFER, capacity, enough
from .buffered import bytes_of
from .collector import Collector
from .plan import Plan

Kind = tuple[int, int, bool]  # of vectors: the number of their need, their fold, and whether they are the first of their rows


class LayerCall(NamedTuple):
    """The units of one call of a layer in the current batch: where they are in the graph, and which of their rows count.

    Shapes: keep (samples, positions) bool, and numbers of the same shape, which padding does not change, on the CPU;
            chosen (samples, count) int64, the positions that were drawn, or None for all
    """

    collector: "DerivativeCollector"
    traced: Traced
    keep: Tensor
    numbers: Tensor
    chosen: Tensor | None

    @property
    def index(self) -> Tensor:
        """Where each unit of each row is in the flattened tensor, (samples, units, positions) int64."""
        value = self.traced.value
        flat = torch.arange(value.numel(), dtype=torch.float64, device=value.device).reshape(value.shape)
        rows = self.collector.site.layer.rows(flat, len(self.keep))
        rows = self.collector.plan.covariance.rows(rows, self.collector.site.port)
        return (rows if self.chosen is None else rows.at(self.chosen)).raw.long()

    def rows(self, vectors: Tensor) -> Tensor:
        """Vectors (k, *shape of the tensor) as rows (k x samples, units, positions)."""
        k = len(vectors)
        rows = self.collector.site.layer.rows(vectors.flatten(0, 1), k * len(self.keep))
        rows = self.collector.plan.covariance.rows(rows, self.collector.site.port)
        rows = rows if self.chosen is None else rows.at(self.chosen.repeat(k, 1))
        return rows.raw

    @property
    def kept(self) -> Tensor:
        """Which of the rows that are read count, (samples, positions) bool on the CPU."""
        return self.keep if self.chosen is None else self.keep.gather(1, self.chosen)


class DerivativeCollector(Collector):
    """Holds the units of a layer until the predictions of a batch are known, and adds vectors at them."""

    def __init__(self, site: Site, plan: Plan, seed: int = 0):
        super().__init__(site, plan, seed)
        self.calls: list[LayerCall] = []
        self.failed: dict[Need, str] = {}  # why a derivative does not exist
        self.unreached: set[Need] = set()  # the graph of derivatives does not lead there
        self.grams: dict[Any, Tensor] = {}  # of buffered vectors
        self.copies = plan.stack is not None and site.layer.name in plan.overwritten

    def rows_of(self, captured: Traced, batch: Batch) -> Traced:
        """The captured tensor, unchanged."""
        return captured

    def see(self, captured: Traced, batch: Batch) -> None:
        """Notes which rows of the units count: unpadded, finite, and at the positions drawn."""
        layer = self.site.layer
        mask = batch.mask_at(side_of(layer, self.site.port))
        rows = about_zero(layer.rows(captured.value, len(batch), mask))
        keep, count = self._finite(rows, batch.group).mask().cpu(), self.plan.positions
        tokens = mask if mask is not None and mask.shape == keep.shape else None
        chosen = draw(batch.hashes, tokens, keep.shape[1], count, self.seed) if count else None
        traced = captured._replace(value=captured.value.clone()) if self.copies else captured
        self.calls.append(LayerCall(self, traced, keep, rows_of_tokens(tokens, *keep.shape), chosen))

    def close(self) -> Rows | None:
        """None: these sums see whole batches."""
        return None

    def add(
        self,
        need: Need,
        batch: Batch,
        x: Tensor,
        keep: Tensor,
        y: Tensor | None = None,
        first: bool = True,
        gram: Tensor | None = None,
        fold: int = 0,
    ) -> None:
        """Adds the products of vectors x (k x samples, units, positions), or with partners y, where ``keep`` (samples, positions).

        A row with an entry that is not finite in any of the vectors does not count. n counts the rows if ``first``. Vectors of
        small batches are buffered, so that one product is formed of those of several batches.
        gram: each x stands for vectors x * u, with any u of which u u' adds up to ``gram`` (units, units)
        """
        kind, parts = ([*self.sums].index(need), fold, first), len(self.sums[need].parts)
        given = {"x": x} if y is None else {"x": x, "y": y}
        tables = {name: _by_sample(t, len(keep)) for name, t in given.items()} | {"keep": keep}
        if x[:, 0].numel() * need.options[0].folds >= min(parts, len(keep)) * enough(x.shape[1]):
            self._add(kind, tables, gram, *(batch.by_group if parts > 1 else (None, [(0, 0, len(keep))])))
            return
        held = self.grams.get(kind)
        if gram is not None and gram is not held and (held is None or not torch.equal(held, gram)):
            self._process_buffer(kind)
            self.grams[kind] = gram
        self._buffer(kind, group=batch.group, **tables)

    def _capacity(self, kind: Any, tables: dict[str, Tensor]) -> int:
        _, k, width, positions = tables["x"].shape
        need, sums = [*self.sums.items()][kind[0]]
        samples = capacity(len(sums.parts), width) // (k * positions)
        return max(1, min(samples, BUFFER // bytes_of(tables)) // need.options[0].folds)

    def flush(self) -> None:
        """Adds all buffered vectors."""
        for kind in self.buffers:
            self._process_buffer(kind)

    def _process_buffer(self, kind: Any) -> None:
        """Adds the buffered vectors of one need and fold, ``kind``, and empties the buffer."""
        if kind not in self.buffers or not self.buffers[kind].filled:
            return
        tables = self.buffers[kind].take()
        group = tables.pop("group")
        if len([*self.sums.values()][kind[0]].parts) < 2:
            group = torch.zeros_like(group)
        order = sorting(group)
        self._add(kind, tables, self.grams.get(kind), order, group_slices(group if order is None else group[order]))

    def _add(
        self, kind: Kind, tables: dict[str, Tensor], gram: Tensor | None, order: Tensor | None, slices: list[tuple[int, int, int]]
    ) -> None:
        """Adds the products of vectors x, and y, (samples, k, units, positions), in an order with slices of one group each."""
        number, fold, first = kind
        need, sums = [*self.sums.items()][number]
        x, y, k, folds = tables["x"], tables.get("y"), tables["x"].shape[1], need.options[0].folds
        keep = self._where_finite(x if y is None else y, tables["keep"])
        keep = keep if order is None else keep[order]
        masked = None if bool(keep.all()) else keep.to(x.device).repeat_interleave(k, 0)
        rows, runs = Rows(_ordered(x, order), masked), [(a * k, b * k) for _, a, b in slices]
        rows = rows.double() if self.plan.precision == "float64" else rows
        if need.statistic is not Products:
            rows = rows.about(*self._shift("positions", rows))
            for (g, *_), (a, b) in zip(slices, runs, strict=True):
                sums.add_rows(rows.take(a, b), g)
            return
        rows = about_zero(rows)
        outer = rows.products_by_run(rows if y is None else about_zero(Rows(_ordered(y, order), masked)), runs)
        outer = outer if y is None else (outer + outer.mT) / 2
        outer = outer if gram is None else outer * gram
        for (g, a, b), product in zip(slices, outer, strict=True):
            n = (b - a) * keep.shape[1] if masked is None else int(keep[a:b].sum())
            sums.add_rows(Fold(n * first, n * k, product, fold, folds), g)

    def chosen_units(self, x: Tensor) -> Tensor:
        """The units that are read, of rows (k x samples, units, positions) with all of them."""
        return self.plan.covariance.rows(Rows(x), self.site.port).raw

    def _where_finite(self, x: Tensor, keep: Tensor) -> Tensor:
        """The rows to keep (samples, positions) without those that have an entry that is not finite in some vector."""
        if math.isfinite(float(x.sum())):
            return keep
        return keep & x.isfinite().all(2).all(1).cpu()


def _by_sample(t: Tensor, samples: int) -> Tensor:
    """Vectors (k x samples, ...) as (samples, k, ...)."""
    return t.unflatten(0, (-1, samples)).transpose(0, 1)


def _ordered(t: Tensor, order: Tensor | None) -> Tensor:
    """Vectors (samples, k, units, positions) as (samples x k, units, positions), of samples in an order; units stay contiguous."""
    if order is None:
        return t.flatten(0, 1)
    order = order.to(t.device)
    found = t.mT.index_select(0, order).mT if t.stride(2) == 1 else t.index_select(0, order)
    return found.flatten(0, 1)
