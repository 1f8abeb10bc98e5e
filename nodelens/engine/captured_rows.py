"""Rows of what a site shows: behind the activation, without padded tokens, sampled or sketched, as its port says."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nodelens.network.batch import Batch
from nodelens.network.group_layer import GroupLayer
from nodelens.network.hooks import Site
from nodelens.network.streams import side_of
from nodelens.statistics.rows import Rows

from .firing import BEHIND
from .plan import Plan

CHUNK = 2 << 20  # bytes of rows per chunk of reductions, so that they stay in the cache


def captured_rows(site: Site, plan: Plan, tensor: Tensor, batch: Batch, by_chunk: bool = False) -> Rows:
    """The rows of a captured tensor. by_chunk: rows behind an activation may be formed as they are taken, which saves memory.

    Rows of gradients are those of samples with a label: the others have no loss, and would only lower the means.
    """
    member = getattr(tensor, "member", None)
    mask = batch.mask_at(side_of(site.layer if member is None else member.layer, site.port))
    if site.port == BEHIND:
        return _behind(site, plan, tensor, len(batch), mask, by_chunk)
    if isinstance(site.layer, GroupLayer) and site.port == "maps":
        rows = site.layer.maps(tensor, len(batch))
    else:
        rows = site.layer.rows(tensor, len(batch), mask)
    rows = rows.double() if plan.precision == "float64" else rows
    if "grad" in site.port and batch.labelled is not None:
        rows = rows.only(batch.labelled)
    if "/tokens" in site.port:
        share = 1 / batch.predicted.clamp_min(1).to(rows.raw)
        rows = Rows(rows.raw * share[:, None, None], rows.keep, rows.shift, rows.grid)
    return _about_zero(plan.covariance.rows(rows, site.port))


def _about_zero(rows: Rows) -> Rows:
    return rows.about(torch.zeros(rows.raw.shape[1], dtype=torch.float64, device=rows.raw.device), shifted=False)


def _behind(site: Site, plan: Plan, tensor: Tensor, samples: int, mask: Tensor | None, by_chunk: bool) -> Rows:
    """The rows behind the activation that follows a layer, given the layer's output."""
    firing, training = plan.dry_run.firing[site.layer.name], site.layer.module.training

    def rows_of(x: Tensor, samples: int, mask: Tensor | None) -> Rows:
        rows = site.layer.rows(firing(x, training), samples, mask)
        return _about_zero(rows.double() if plan.precision == "float64" else rows)

    one_by_one = len(tensor) == samples and not (training and firing.has_norm)
    if not (by_chunk and one_by_one and tensor.device.type == "cpu" and tensor.nbytes > CHUNK):
        return rows_of(tensor, samples, mask)
    return ChunkedRows.of(lambda a, b: rows_of(tensor[a:b], b - a, None if mask is None else mask[a:b]), samples)


@dataclass(frozen=True, eq=False)
class ChunkedRows(Rows):
    """Rows that are formed when samples are taken. Only their shape can be read before."""

    made: Callable[[int, int], Rows] = field(kw_only=True)

    @classmethod
    def of(cls, made: Callable[[int, int], Rows], samples: int) -> "ChunkedRows":
        """From a function that forms the rows of the samples ``first`` to ``end - 1``."""
        one = made(0, 1)
        shape = one.raw.expand(samples, *one.raw.shape[1:])
        return cls(shape, None, one.shift, one.grid, one.shifted, made=made)

    def take(self, first: int, last: int) -> Rows:
        return self.made(first, last).about(self.shift, self.shifted)

    def about(self, shift: Tensor, shifted: bool = True) -> "ChunkedRows":
        return ChunkedRows(self.raw, self.keep, shift, self.grid, shifted, made=self.made)
