"""How long models take, measured side by side."""

import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nodelens.engine.analyze import device_of
from nodelens.network.batch import Batch
from nodelens.network.eval_mode import eval_mode

WARM = 10
QUARTILES = ("median", "q25", "q75")


def latency(
    models: Mapping[str, nn.Module], batch: Batch, batches: Sequence[int] = (1, 64), repeats: int = 30
) -> dict[str, dict[str, float]]:
    """{model: {batch1_median: ms, batch1_q25, batch1_q75, ...}}: one forward pass in eval mode, without gradients.

    The models take turns, so that what else the machine does meets all alike; ten rounds before are not counted. A batch is the
    batch's samples, repeated. On a GPU by CUDA events, elsewhere by the wall clock; threads stay as they are set.
    Raises ValueError for fewer than 3 repeats or a batch below 1.
    """
    if repeats < 3 or min(batches, default=1) < 1:
        raise ValueError(f"latency: {repeats} repeats of batches {list(batches)}; it takes 3 repeats and 1 sample at least")
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    for size in batches:
        part = _tiled(batch, size)
        times: dict[str, list[float]] = {name: [] for name in models}
        for k in range(WARM + repeats):
            for name, model in models.items():
                took = _once(model, part.to(device_of(model)))
                if k >= WARM:
                    times[name].append(took)
        for name, taken in times.items():
            q25, median, q75 = statistics.quantiles(taken, n=4)
            found[name] |= {f"batch{size}_{k}": v for k, v in zip(QUARTILES, (median, q25, q75), strict=True)}
    return found


def _once(model: nn.Module, batch: Batch) -> float:
    """Milliseconds of a forward pass."""
    with eval_mode(model), torch.inference_mode():
        if device_of(model).type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            batch.run(model)
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end)
        started = time.perf_counter()
        batch.run(model)
        return 1e3 * (time.perf_counter() - started)


def _tiled(batch: Batch, samples: int) -> Batch:
    def repeat(t: Tensor) -> Tensor:
        return t.repeat(-(-samples // len(t)), *[1] * (t.ndim - 1))[:samples]

    return batch.map(repeat)
