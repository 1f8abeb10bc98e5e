"""Latency of several models, measured in alternation."""

import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nodelens.engine.driver import device_of
from nodelens.network.batch import Batch
from nodelens.network.eval_mode import eval_mode

WARM = 10  # rounds before the first that counts
QUARTILES = ("median", "q25", "q75")


def latency(
    models: Mapping[str, nn.Module], batch: Batch, batches: Sequence[int] = (1, 64), repeats: int = 30
) -> dict[str, dict[str, float]]:
    """{model: {batch1_median: ms, batch1_q25, batch1_q75, ...}}: one forward pass in eval mode, without gradients.

    The models alternate, so that other load on the machine affects all alike; the first ten rounds do not count. Larger batches
    repeat the samples of ``batch``. Time is measured by CUDA events on a GPU, else by the wall clock; the number of threads is not
    changed. Raises ValueError for fewer than 3 repeats or a batch size below 1.
    """
    if repeats < 3 or min(batches, default=1) < 1:
        raise ValueError(f"latency: {repeats} repeats of batches {list(batches)}: give at least 3 repeats and batches of 1 or more")
    results: dict[str, dict[str, float]] = {name: {} for name in models}
    for size in batches:
        part = _tiled(batch, size)
        times: dict[str, list[float]] = {name: [] for name in models}
        for k in range(WARM + repeats):
            for name, model in models.items():
                ms = _forward_ms(model, part.to(device_of(model)))
                if k >= WARM:
                    times[name].append(ms)
        for name, measured in times.items():
            q25, median, q75 = statistics.quantiles(measured, n=4)
            results[name] |= {f"batch{size}_{k}": v for k, v in zip(QUARTILES, (median, q25, q75), strict=True)}
    return results


def _forward_ms(model: nn.Module, batch: Batch) -> float:
    """Duration of one forward pass in milliseconds."""
    with eval_mode(model, as_written=False), torch.inference_mode():
        if device_of(model).type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            model(*batch.args, **batch.kwargs)
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end)
        started = time.perf_counter()
        model(*batch.args, **batch.kwargs)
        return 1e3 * (time.perf_counter() - started)


def _tiled(batch: Batch, samples: int) -> Batch:
    def repeat(t: Tensor) -> Tensor:
        return t.repeat(-(-samples // len(t)), *[1] * (t.ndim - 1))[:samples]

    return batch.map(repeat)
