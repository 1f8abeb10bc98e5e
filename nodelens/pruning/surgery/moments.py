"""What consumers read on average: sums over the calibration data at the input of each."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.engine.analyze import device_of
from nodelens.network.batch import Batch
from nodelens.network.eval_mode import eval_mode
from nodelens.network.groups import PruningGroup
from nodelens.network.hooks import Capture, Site
from nodelens.network.layers import Layer
from nodelens.statistics import Accumulator, Gram, Moments
from nodelens.statistics.processes import reduce_sums
from nodelens.statistics.rows import Rows


def input_moments(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    data: Iterable[Any],
    products: bool = False,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, Moments | Gram]:
    """{module path: sums of what it reads} of the groups' consumers; with ``products`` of its Linear layers all pairs' too.

    Padded tokens do not count. Sums are float64; under a process group of all processes' data.
    """
    paths = list(dict.fromkeys(piece.module for group in groups for piece in group.by_role("consumer") if piece.entry is None))
    layers = {path: Layer(path, model.get_submodule(path), "input") for path in paths}
    kinds = {path: Gram if products and pointwise(layer.module) else Moments for path, layer in layers.items()}
    sums = {path: Accumulator(kind) for path, kind in kinds.items()}
    shifts: dict[str, Tensor] = {}
    batch: Batch

    def see(site: Site, tensor: Tensor) -> None:
        rows = site.layer.rows(tensor, len(batch))
        if batch.mask is not None and batch.mask.shape == (len(rows), rows.raw.shape[2]):
            rows = rows.kept(batch.mask)
        rows = Rows(rows.raw, rows.keep, torch.zeros(rows.raw.shape[1], dtype=torch.float64, device=tensor.device)).finite()
        shift = shifts.setdefault(site.layer.name, rows.mean)
        sums[site.layer.name].add_rows(rows.about(shift))

    device = device_of(model)
    capture = Capture([Site(layer, "output") for layer in layers.values()], see)
    with eval_mode(model), torch.no_grad(), capture:
        capture.gate = True
        for batch in progress(data):
            batch = Batch.of(batch).to(device)
            batch.run(model)
    reduce_sums(sums, device)
    found = {path: total.value for path, total in sums.items()}
    if any(value is None for value in found.values()):
        raise ValueError(
            f"nothing was read by {', '.join(k for k, v in found.items() if v is None)}: the data are empty, or it is never called"
        )
    return found  # type: ignore[return-value]


def pointwise(module: nn.Module) -> bool:
    """Whether a module's output at a position is a matrix times its input there: a Linear layer, a 1x1 convolution."""
    if isinstance(module, nn.modules.conv._ConvNd):
        one = all(k == 1 for k in module.kernel_size) and module.groups == 1 and not module.transposed
        return one and all(s == 1 for s in module.stride) and not any(module.padding if isinstance(module.padding, tuple) else ())
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2
