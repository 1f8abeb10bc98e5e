"""Modules of dense graphs against networkx's Louvain, with the graph it needs: python benchmarks/modules.py [units ...]

For each number of units: the time of both with as many seeds, and how far the modularity found is above that of networkx. Graphs:
uniform weights without modules, correlations of independent and of modular units, binary edges, and planted modules. The graphs of
networkx are timed once, with the seeds; ours as the median of three runs.
"""

import statistics
import sys
import time
from collections.abc import Callable

import networkx as nx
import numpy as np

from nodelens.analysis.modularity.find_modules import find_modules

SEEDS = 2


def symmetric(matrix: np.ndarray) -> np.ndarray:
    upper = np.triu(matrix, 1)
    return upper + upper.T


def graphs(units: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(units)
    modules = rng.integers(0, 8, units)
    same = modules[:, None] == modules
    rows = rng.standard_normal((2 * units, units))
    factors = rng.standard_normal((2 * units, 8))[:, modules]
    return {
        "uniform weights": symmetric(rng.random((units, units))),
        "correlations": symmetric(np.abs(np.corrcoef((rows + 0.3 * factors).T))),
        "planted modules": symmetric((rng.random((units, units)) < np.where(same, 0.5, 0.1)).astype(float)),
        "binary": symmetric((rng.random((units, units)) < 0.1).astype(float)),
    }


def timed(run: Callable[[], float], rounds: int) -> tuple[float, float]:
    """Median seconds, and the value."""
    seconds, value = [], 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        value = run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), value


def theirs(weights: np.ndarray) -> float:
    graph = nx.from_numpy_array(weights)
    found = (nx.community.louvain_communities(graph, seed=seed) for seed in range(SEEDS))
    return max(nx.community.modularity(graph, modules) for modules in found)


def main() -> None:
    print(f"{SEEDS} seeds each; seconds with building the graph")
    for units in map(int, sys.argv[1:] or (64, 128, 256, 512, 1024)):
        for name, weights in graphs(units).items():
            own, q = timed(lambda weights=weights: find_modules(weights, starts=SEEDS).q, 3)
            other, reached = timed(lambda weights=weights: theirs(weights), 1)
            ratio = f"{other / own:6.0f} times faster"
            print(
                f"{units:5d} {name:16s} ours {own:7.3f}, networkx {other:8.3f}: {ratio}; Q {q:.5f}, {q - reached:+.5f}", flush=True
            )


if __name__ == "__main__":
    main()
