"""The collector of derivatives at one layer: adds products of the vectors that are pulled back to its units."""

from typing import NamedTuple

import torch
from torch import Tensor

from nodelens.metrics import Need
from nodelens.network.batch import Batch
from nodelens.network.streams import side_of
from nodelens.network.traced import Traced
from nodelens.statistics.group_slices import draw
from nodelens.statistics.linalg import exact_products
from nodelens.statistics.products import Vectors

from .collector import Collector


class LayerCall(NamedTuple):
    """The units of one call of a layer in the current batch: where they are in the graph, and which of their rows count."""

    traced: Traced
    keep: Tensor  # (samples, positions) bool, on the CPU
    chosen: Tensor | None  # (samples, count) int64, the positions that were drawn; None for all


class DerivativeCollector(Collector):
    """Holds the units of a layer until the predictions of a batch are known, and adds what is pulled back to them."""

    calls: list[LayerCall]

    def rows_of(self, captured: Traced, batch: Batch) -> Traced:
        """The captured tensor, unchanged."""
        self.calls = [] if getattr(self, "batch", None) is not batch else self.calls
        self.batch = batch
        return captured

    def see(self, captured: Traced, batch: Batch) -> None:
        """Notes which rows of the units count: unpadded, finite, and at the positions drawn."""
        layer = self.site.layer
        mask = batch.mask_at(side_of(layer, self.site.port))
        rows = layer.rows(captured.value, len(batch), mask)
        finite = self._finite(rows.about(torch.zeros(rows.raw.shape[1], dtype=torch.float64), shifted=False), batch.group)
        keep, count = finite.mask().cpu(), self.plan.positions
        chosen = draw(batch.hashes, keep, keep.shape[1], count, self.seed) if count else None
        self.calls.append(LayerCall(captured, keep, chosen))

    def add(self, need: Need, call: LayerCall, fold: int, vectors: Tensor, keep: Tensor, first: bool) -> None:
        """Adds vectors (k, *shape of the units) of a fold, at the rows to keep (samples, positions)."""
        k, samples = vectors.shape[:2]
        rows = self.site.layer.rows(vectors.flatten(0, 1), k * samples)
        rows = self.plan.covariance.rows(rows.kept(keep.repeat(k, 1).to(rows.raw.device)), self.site.port)
        rows = rows.double() if self.plan.precision == "float64" else rows
        chosen = call.chosen
        rows = rows if chosen is None else rows.at(chosen.repeat(k, 1))
        kept = keep if chosen is None else keep.gather(1, chosen)
        rows = rows.about(torch.zeros(rows.raw.shape[1], dtype=torch.float64, device=rows.raw.device), shifted=False)
        sums, group = self.sums[need], self.batch.group
        with exact_products():
            for g in group.unique().tolist() if len(sums.parts) > 1 else [0]:
                own = (group == g).nonzero()[:, 0] if len(sums.parts) > 1 else torch.arange(samples)
                n = kept[own].sum().reshape(1).to(rows.raw.device) * int(first)
                part = rows.index((own + samples * torch.arange(k)[:, None]).flatten())
                sums.add_rows(Vectors(part, None, fold, need.options[0].folds, n), g)
