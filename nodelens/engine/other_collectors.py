"""Collectors of sums that are no sums over rows of one site: over weights, and over the whole model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nodelens.network.batch import Batch
from nodelens.network.hooks import Site
from nodelens.network.layers import Layer
from nodelens.network.streams import side_of
from nodelens.statistics.rows import Rows
from nodelens.statistics.weight_sums import WeightSums

from .collector import Collector
from .plan import Plan


class WeightCollector(Collector):
    """Adds products of a layer's input, output and output gradient, in the shape of its weights."""

    def rows_of(self, captured: Any, batch: Batch) -> Any:
        """The captured (input, output, gradient), unchanged."""
        return captured

    def see(self, captured: Any, batch: Batch) -> None:
        """Adds the input, output and gradient of one batch."""
        mask = batch.mask_at(side_of(self.site.layer, self.site.port))
        for g in batch.group.unique().tolist():
            samples = (batch.group == g).nonzero()[:, 0].to(captured[0].device)
            keep, labelled = (None if t is None else t[samples] for t in (mask, batch.labelled))
            x, y, gradient = (t[samples] for t in captured)
            for need in self.sums:
                self.put(need, g, weight_sums(self.site.layer, x, y, gradient, keep, labelled))


class ModelCollector(Collector):
    """Holds sums over the whole model: gradients of weights, a copy in training, products with supernodes."""

    def __init__(self, site: Site, plan: Plan, seed: int = 0):
        self.site, self.plan, self.seed, self.left_out, self.by_token = site, plan, seed, 0, []
        self.unread, self.targets = "", []
        self.rows_seen, self.lost = torch.zeros(1, dtype=torch.int64), torch.zeros(plan.groups, dtype=torch.int64)
        model, groups = site.layer.module, plan.members.groups
        self.sums = {need: need.statistic(model, groups, *need.options) for need in plan.needs(site.layer)}  # type: ignore[call-arg,misc]

    def close(self) -> Rows | None:
        """None: these sums see whole batches."""
        return None

    def end(self, rows: Rows | None, batch: Batch, targets: Mapping[Any, Tensor]) -> None:
        """Does nothing: no rows are buffered."""

    def flush(self) -> None:
        """Does nothing: no rows are buffered."""


def weight_sums(
    layer: Layer, x: Tensor, y: Tensor, gradient: Tensor, keep: Tensor | None = None, samples: Tensor | None = None
) -> WeightSums:
    """The statistic of one batch; ``keep`` (B, T) masks the positions of padded tokens, ``samples`` (B,) chooses samples."""
    out, slope = (layer.rows(t, len(t)).raw.transpose(1, 2).flatten(0, 1) for t in (y, gradient))
    read = layer.patches(x)
    keep = keep.flatten() if keep is not None and keep.numel() == len(read) else None
    if samples is not None:
        every = samples.repeat_interleave(len(read) // len(samples))
        keep = every if keep is None else keep & every
    return WeightSums.of(read, out, slope, keep, groups=getattr(layer.module, "groups", 1))
