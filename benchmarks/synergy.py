"""Synergy over all pairs against a plain loop over a sample of pairs: python benchmarks/synergy.py

The loop is the formula written down: covariance of two units and the target, determinants, a maximum, a mean.
"""

import time

import torch
from timing import interleaved

from nodelens.metrics import get_metric
from nodelens.statistics import Cross, Gram
from nodelens.statistics.rows import Rows


def loop(y: torch.Tensor, z: torch.Tensor, partners: int, generator: torch.Generator) -> torch.Tensor:
    """Mean over some random partners of each unit, pair by pair."""

    def information(*columns: torch.Tensor) -> float:
        c = torch.cov(torch.stack([*columns, z]))
        return float(0.5 * torch.log(torch.det(c[:-1, :-1]) * c[-1, -1] / torch.det(c)))

    scores = torch.zeros(y.shape[1])
    for i in range(y.shape[1]):
        others = [j for j in torch.randperm(y.shape[1], generator=generator).tolist() if j != i][:partners]
        pairs = [information(y[:, i], y[:, j]) - max(information(y[:, i]), information(y[:, j])) for j in others]
        scores[i] = sum(pairs) / len(pairs)
    return scores


def main() -> None:
    units, samples, partners = 512, 2000, 100
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(samples, units, generator=generator) @ torch.randn(units, units, generator=generator)
    z = y[:, :8].sum(1) + torch.randn(samples, generator=generator)
    metric = get_metric("synergy", target="given")

    def all_pairs() -> torch.Tensor:
        rows = Rows.of(y)
        return metric(None, y=Gram.of(rows), z=Cross.of(rows, z))

    ours = interleaved({"ours": all_pairs})["ours"]
    timed = 200  # units of the loop with one partner each: the other pairs are the same again
    start = time.perf_counter()
    loop(y[:, :timed], z, 1, generator)
    theirs = (time.perf_counter() - start) / timed * units * partners
    print(f"{units} units, {samples} samples: all {units * (units - 1):,} pairs {1e3 * ours:.1f} ms")
    print(f"a plain loop over {partners} partners a unit {theirs:.1f} s (from {timed} pairs timed): {theirs / ours:,.0f} times")


if __name__ == "__main__":
    main()
