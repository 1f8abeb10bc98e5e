"""Interleaved timing: every contestant once a round, medians or means over rounds, ratios to the first."""

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int = 9,
    processor: bool = False,
    average: Callable[[list[float]], float] = statistics.median,
) -> dict[str, float]:
    """Seconds of each, averaged over rounds, run in turn so that a slow moment of the machine meets them all.

    processor: of the process on all cores, which other programs disturb less, not of the clock on the wall
    average:   ``statistics.fmean`` for work of which a part is done in some rounds only, which a median would leave out
    """
    clock = time.process_time if processor else time.perf_counter
    for run in contestants.values():
        run()  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return {name: average(times) for name, times in seconds.items()}


def cells(values: Mapping[str, object], head: bool = False) -> str:
    """One line of a table, below a line with the names of its columns if ``head``."""
    widths = [max(16, len(name) + 2) for name in values]
    shown = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in values.values()]
    lines = ([*values] if head else None, shown)
    return "\n".join("".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines if line)
