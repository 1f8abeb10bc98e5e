"""The collectors of derivatives: they add products of vectors at the units of a layer, or of all layers side by side."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nodelens.metrics import Need
from nodelens.network.batch import Batch
from nodelens.network.hooks import Site
from nodelens.network.random_vectors import rows_of_tokens
from nodelens.network.streams import side_of
from nodelens.network.traced import Traced
from nodelens.statistics.group_slices import draw
from nodelens.statistics.products import Fold, Products, about_zero
from nodelens.statistics.rows import Rows

from .collector import Collector
from .plan import Plan


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
        folds: int = 1,
    ) -> None:
        """Adds the products of vectors x (k x samples, units, positions), or with partners y, where ``keep`` (samples, positions).

        A row with an entry that is not finite in any of the vectors does not count. n counts the rows if ``first``.
        gram: each x stands for vectors x * u, with any u of which u u' adds up to ``gram`` (units, units)
        """
        x, sums, k = x.double() if self.plan.precision == "float64" else x, self.sums[need], len(x) // len(keep)
        keep = self._where_finite(x if y is None else y, keep)
        order, slices = batch.by_group if len(sums.parts) > 1 else (None, [(0, 0, len(keep))])
        keep = keep if order is None else keep[order]
        masked = None if bool(keep.all()) else keep.to(x.device).repeat_interleave(k, 0)
        rows, runs = Rows(_by_sample(x, k, order), masked), [(a * k, b * k) for _, a, b in slices]
        if need.statistic is not Products:
            rows = rows.about(*self._shift("positions", rows))
            for (g, *_), (a, b) in zip(slices, runs, strict=True):
                sums.add_rows(rows.take(a, b), g)
            return
        rows = about_zero(rows)
        outer = rows.products_by_run(rows if y is None else about_zero(Rows(_by_sample(y, k, order), masked)), runs)
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
        return keep & x.isfinite().all(1).unflatten(0, (-1, len(keep))).all(0).cpu()


def _by_sample(t: Tensor, k: int, order: Tensor | None) -> Tensor:
    """Vectors (k x samples, ...) as (samples x k, ...), those of a sample together, of samples in an order."""
    t = t.unflatten(0, (k, -1)).transpose(0, 1)
    return (t if order is None else t.index_select(0, order.to(t.device))).flatten(0, 1)
