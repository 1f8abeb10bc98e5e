"""What the laws run over: every statistic and every metric, each with rows it can be made of."""

from collections.abc import Callable
from typing import Any

import torch
from published import OF_LAYERS
from torch import Tensor

from nodelens.metrics import Metric, get_metric
from nodelens.statistics import (
    STATISTICS,
    ByClass,
    ClassCross,
    ClassGram,
    ClassSizes,
    ClassStatistic,
    Cosines,
    Cross,
    Directions,
    Gram,
    Higher,
    Located,
    MeanSizes,
    Moments,
    NormedGram,
    NormedPair,
    Pair,
    Patches,
    PatchesByClass,
    Products,
    Quantiles,
    Sample,
    Sizes,
    Statistic,
    Zeros,
)
from nodelens.statistics.convolution import ConvolutionGeometry
from nodelens.statistics.rows import Rows
from nodelens.statistics.sample_hash import mix

CONV = ConvolutionGeometry((3,), (2,), (1,), ((1, 1),))
Make = Callable[[Tensor, Tensor | None], Statistic]


def drifting(n: int = 101, width: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows whose mean drifts: parts that look alike would hide a wrong merge."""
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    x = x + torch.arange(n)[:, None] * torch.linspace(0.1, 1, width, dtype=torch.float64)
    x[::7, 0] = 0
    return x.to(dtype)


def labels(n: int) -> Tensor:
    """Classes that come late and unevenly."""
    return (torch.arange(n) * 7 % 11 // 3).clamp_max(torch.arange(n) // 10)


def target(n: int) -> Tensor:
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return z + torch.arange(n)[:, None] / 10


def maps(x: Tensor) -> Tensor:
    """Each row as a sample of two channels of five places."""
    turns = torch.stack([x.roll(k, 1) * (k + 1) for k in range(10)], 2)
    return turns[:, :2, :].contiguous()


MAKERS: dict[type[Statistic], Callable[..., Statistic]] = {
    Moments: lambda x, at, **k: Moments.of(x, **k),
    Sizes: lambda x, at, **k: Sizes.of(x, **k),
    Zeros: lambda x, at, **k: Zeros.of(x, **k),
    Higher: lambda x, at, **k: Higher.of(x, **k),
    MeanSizes: lambda x, at, **k: MeanSizes.of(x, **k),
    Quantiles: lambda x, at, **k: Quantiles.of(x, **k),
    Gram: lambda x, at, **k: Gram.of(x, **k),
    NormedGram: lambda x, at, **k: NormedGram.of(x, **k),
    Directions: lambda x, at, **k: Directions.of(x, **k),
    Pair: lambda x, at, **k: Pair.of(x, target(400)[at], **k),
    NormedPair: lambda x, at, **k: NormedPair.of(x, target(400)[at], **k),
    Cosines: lambda x, at, **k: Cosines.of(x, target(400).repeat(1, 3)[at, : x.shape[1]], **k),
    Products: lambda x, at, **k: Products.of(x, **k),
    Located: lambda x, at, **k: Located.of(x, **k),
    Cross: lambda x, at, **k: Cross.of(x, target(400)[at], **k),
    ByClass: lambda x, at, **k: ByClass.of(x, labels(400)[at], **k),
    ClassSizes: lambda x, at, **k: ClassSizes.of(x, labels(400)[at], **k),
    ClassGram: lambda x, at, **k: ClassGram.of(x, labels(400)[at], **k),
    ClassCross: lambda x, at, **k: ClassCross.of(x, torch.cat([labels(400)[:, None], target(400)], 1)[at], **k),
    Patches: lambda x, at, **k: Patches.of(_as_maps(x, **k), geometry=CONV),
    PatchesByClass: lambda x, at, **k: PatchesByClass.of(_as_maps(x, **k), labels(400)[at], geometry=CONV),
    Sample: lambda x, at, **k: Sample.of(x, target(400)[at], hashes=mix(torch.arange(400))[at], **k),
}
assert set(MAKERS) == set(STATISTICS), "a statistic without its laws"


def _as_maps(x: Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Rows:
    m = maps(x) if x.shape[1] > 1 else x[:, :, None].expand(-1, 1, 10)
    keep = None if weights is None else weights.bool()[:, None].expand(-1, m.shape[2])
    rows = Rows.of(m.contiguous(), keep)
    return Rows(rows.raw, rows.keep, rows.shift, (m.shape[2],))


def make(statistic: type[Statistic], x: Tensor, start: int = 0, **options: Any) -> Statistic:
    """A statistic of rows that stand at ``start`` of the whole."""
    return MAKERS[statistic](x, slice(start, start + len(x)), **options)


def values(s: Statistic) -> dict[str, Tensor]:
    """What can be read off a statistic, whatever its shift."""
    if isinstance(s, ClassStatistic):
        seen = s.only(s.n > 1)
        return {"n": s.n} | {name: _read(seen, name) for name in READ[type(s)]}
    return {name: _read(s, name) for name in READ[type(s)]}


READ: dict[type[Statistic], tuple[str, ...]] = {
    Moments: ("n", "mean", "variance", "mean_square"),
    Sizes: ("n", "absolute"),
    Zeros: ("n", "zeros"),
    Higher: ("n", "mean", "variance", "mean_square", "kurtosis", "skewness"),
    MeanSizes: ("n", "square"),
    Quantiles: ("n", "counts", "largest"),
    Gram: ("n", "mean", "covariance"),
    NormedGram: ("n", "mean", "covariance"),
    Directions: ("n", "mean", "covariance", "outer", "shift"),
    Pair: ("n", "mean", "target_mean", "covariance"),
    NormedPair: ("n", "mean", "target_mean", "covariance", "centre_mixed", "centre_left", "centre_right", "centre_e"),
    Cosines: ("n", "mean"),
    Products: ("n", "mean"),
    Located: ("n", "mean"),
    Cross: ("n", "covariance", "target_covariance", "target_mean"),
    ByClass: ("mean", "variance", "mean_square"),
    ClassSizes: ("absolute", "mean"),
    ClassGram: ("mean", "covariance"),
    ClassCross: ("covariance", "variance", "target_variance"),
    Patches: ("n", "mean", "variance"),
    PatchesByClass: ("mean", "variance"),
    Sample: ("seen", "hashes", "rows", "target"),
}


def _read(s: Statistic, name: str) -> Tensor:
    field = name.removeprefix("centre_")  # what has no property is read about the means
    value = getattr(s.centred() if name != field else s, field)
    return value() if callable(value) else value


def everything(n: int = 60, units: int = 4, fan_in: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """Tensors of a small layer, enough for every metric."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, fan_in, generator=g, dtype=torch.float64) + 1
    w = torch.randn(units, fan_in, generator=g, dtype=torch.float64)
    y = x @ w.T
    logits = torch.randn(n, 3, generator=g, dtype=torch.float64) + y[:, :1]
    return {
        "inputs": x,
        "weights": w,
        "outputs": y,
        "labels": torch.randint(3, (n,), generator=g),
        "logits": logits,
        "gradients": torch.randn(n, units, generator=g, dtype=torch.float64),
        "initial_weights": w + torch.randn(units, fan_in, generator=g, dtype=torch.float64),
        "norm_weights": torch.randn(units, generator=g, dtype=torch.float64),
        "next_outputs": y @ torch.randn(units, units, generator=g, dtype=torch.float64) + 1,
    }


_METRICS = [get_metric(name) for name in OF_LAYERS]
EVERY_METRIC: list[Metric] = list({repr(m): m for m in _METRICS}.values())  # a preset may be the default: once is enough
