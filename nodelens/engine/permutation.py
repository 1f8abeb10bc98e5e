"""The permutation test: a metric's values for targets that are independent of the units."""

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
    """The mean of a metric over random permutations of its target over the samples (``_null``), and its p-value (``_p``).

    Both use the 2,048 stored samples with the smallest hashes (all if there are fewer), so they do not depend on batches or their
    order. ``_null`` has the same bias as the value; their difference is due to the target.

    Shapes: those of the metric; ``_p`` in (0, 1], (1 + #{null >= value}) / (1 + permutations)
    Source: Phipson & Smyth 2010, 1603.05766, eq. 2
    """
    sample: Sample = statistics["permutations"]
    order = torch.argsort(sample.hashes, stable=True)
    rows = Rows(sample.rows[order][:, :, None])
    rows = rows.about(rows.mean)
    target = sample.target[order]
    value = metric(weight, **_statistics_of(needs, rows, target))
    total, at_least = torch.zeros_like(value), torch.zeros_like(value)
    copies = int(metric.options["permutations"])
    for copy in range(copies):
        permuted = torch.argsort(mix(torch.arange(len(target)), seed, copy))
        null = metric(weight, **_statistics_of(needs, rows, target[permuted]))
        total += null
        at_least += null >= value
    known = value.isfinite()
    return {"_null": (total / copies).where(known, torch.nan), "_p": ((1 + at_least) / (1 + copies)).where(known, torch.nan)}


def _statistics_of(needs: Mapping[str, Need], rows: Rows, target: Tensor) -> dict[str, Any]:
    """A metric's statistics, computed from rows and their paired target."""
    made: dict[str, Any] = {}
    for name, need in needs.items():
        if name == "permutations":
            continue
        paired = [target[:, 0].long() if need.target == "label" else target] * bool(need.target and need.statistic.paired())
        hashes = {"hashes": torch.arange(len(rows))} if need.statistic.takes_hashes else {}
        made[name] = need.statistic.of(rows, *paired, **hashes)  # type: ignore[attr-defined]
    return made
