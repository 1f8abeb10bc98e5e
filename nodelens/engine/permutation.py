"""The permutation test: what a metric says of a target that has nothing to do with the units."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nodelens.metrics import Metric, Need
from nodelens.statistics import Sample
from nodelens.statistics.rows import Rows
from nodelens.statistics.sample_hash import mix


def null_of(
    metric: Metric, weight: Tensor | None, needs: Mapping[str, Need], statistics: Mapping[str, Any], seed: int = 0
) -> dict[str, Tensor]:
    """Mean of a metric over copies of its target that are permuted over the samples, and the p-value of what it says.

    Both are taken on the samples held for it, the 2,048 with the smallest keys, all while there are no more: neither depends
    on batches or their order. ``_null`` is biased as the value is: their difference is what the target adds.

    Shapes: those of the metric; ``_p`` in (0, 1], (1 + #{null >= value}) / (1 + copies)
    Source: Phipson & Smyth 2010, 1603.05766, eq. 2
    """
    sample: Sample = statistics["permutations"]
    order = torch.argsort(sample.hashes, stable=True)
    rows = Rows(sample.rows[order][:, :, None])
    rows = rows.about(rows.mean)
    beside = sample.target[order]
    value = metric(weight, **_made(needs, rows, beside))
    total, above = torch.zeros_like(value), torch.zeros_like(value)
    copies = int(metric.options["permutations"])
    for copy in range(copies):
        shuffled = torch.argsort(mix(torch.arange(len(beside)), seed, copy))
        null = metric(weight, **_made(needs, rows, beside[shuffled]))
        total += null
        above += null >= value
    known = value.isfinite()
    return {"_null": (total / copies).where(known, torch.nan), "_p": ((1 + above) / (1 + copies)).where(known, torch.nan)}


def _made(needs: Mapping[str, Need], rows: Rows, beside: Tensor) -> dict[str, Any]:
    """A metric's statistics, of rows in hand and what stands beside them."""
    made: dict[str, Any] = {}
    for name, need in needs.items():
        if name == "permutations":
            continue
        target = [beside[:, 0].long() if need.target == "label" else beside] * bool(need.target and need.statistic.paired())
        keys = {"hashes": torch.arange(len(rows))} if need.statistic.takes_hashes else {}
        made[name] = need.statistic.of(rows, *target, **keys)  # type: ignore[attr-defined]
    return made
