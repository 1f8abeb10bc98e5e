"""Rows at the tokens that have a target, held until the logits of a batch are known."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nodelens.metrics import Need
from nodelens.network.batch import Batch
from nodelens.statistics.gram import TERMS
from nodelens.statistics.group_slices import draw, group_slices
from nodelens.statistics.linalg import exact_products
from nodelens.statistics.rows import Rows
from nodelens.statistics.sample_hash import mix

from .collector import Collector


@dataclass(frozen=True)
class TargetTokens:
    """The tokens of a batch that have a target.

    Shapes: index (m,) into the B x T tokens; values (m, t) float64, finite; group (m,) and hashes (m,) on the CPU
    """

    shape: tuple[int, int]
    index: Tensor
    values: Tensor
    group: Tensor
    hashes: Tensor

    @classmethod
    def of(cls, target: Tensor, batch: Batch, positions: int | None, seed: int) -> "TargetTokens":
        """Tokens of a target (B, T, t), NaN where there is none. Padding, and positions that are not drawn, are left out."""
        samples, length = target.shape[:2]
        mask = batch.predicting if batch.predicting is not None and batch.predicting.shape == (samples, length) else None
        known = target.isfinite().all(2)
        known = known if mask is None else known & mask
        chosen = draw(batch.hashes, mask, length, positions, seed) if positions else None
        if chosen is not None:
            known = known & torch.zeros_like(known).scatter(1, chosen.to(known.device), True)
        index = known.flatten().nonzero()[:, 0]
        index = index[batch.group[index.cpu() // length].argsort(stable=True).to(index.device)]  # by group
        each, row = index.cpu(), (torch.ones(samples, length) if mask is None else mask.cpu()).cumsum(1).long().flatten()
        sample = each // length
        hashes = mix(batch.hashes[sample], row[each])  # rows count unpadded tokens only, so padding does not change the hash
        return cls((samples, length), index, target.flatten(0, 1)[index], batch.group[sample], hashes)


class TokenRows:
    """Holds the rows of a site until the batch ends, because token targets are computed from the logits."""

    def __init__(self, owner: Collector):
        self.owner, self.held = owner, list[Rows]()
        self.shift: Tensor | None = None
        layer, port = owner.site
        self.copied = owner.plan.seen(layer, port).overwritten

    def see(self, rows: Rows) -> None:
        """Takes the rows of one call."""
        self.held.append(rows.copy() if self.copied else rows)

    def end(self, tokens: Mapping[Any, TargetTokens]) -> None:
        """Adds the rows at the tokens that have a target."""
        for rows in self.held:
            for target in dict.fromkeys(need.target for need in self.owner.by_token):
                self._add(rows, tokens[target], [need for need in self.owner.by_token if need.target == target])
        self.held = []

    def _add(self, rows: Rows, at: TargetTokens, needs: list[Need]) -> None:
        samples, _, positions = rows.raw.shape
        if (samples, positions) != at.shape:
            raise ValueError(
                f"{self.owner.site} has {positions} rows per sample, but target {needs[0].target!r} has one value for "
                f"each of {at.shape[1]} tokens: leave out the layer (layers=), or metrics with a target"
            )
        flat = rows.raw.transpose(1, 2).flatten(0, 1)[at.index]
        rows_at = self.owner.only_finite(Rows(flat.T[None]))
        if self.shift is None:
            self.shift = rows_at.pilot()
        shifted, keep = bool(self.shift.any()), None if rows_at.keep is None else rows_at.keep[0]
        with exact_products():
            for g, a, b in group_slices(at.group, TERMS):
                kept = None if keep is None else keep[a:b]
                one = Rows(flat[a:b].T[None], None if kept is None else kept[None], self.shift, (), shifted)  # all as one sample
                each = Rows(flat[a:b, :, None], None if kept is None else kept[:, None], self.shift, (), shifted)
                for need in needs:
                    target = at.values[a:b, 0].long() if need.target == "label" else at.values[a:b]
                    hashes = {"hashes": at.hashes[a:b]} if need.statistic.takes_hashes else {}
                    made = need.statistic.of(each, target, **hashes) if need.statistic.paired() else need.statistic.of(one)  # type: ignore[attr-defined]
                    self.owner.put(need, g, made)
