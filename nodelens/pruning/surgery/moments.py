"""Moments of the consumers' inputs over the calibration data."""

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
    """{path of a consumer: moments of its input}; with ``products``, Linear layers and 1x1 convolutions get a ``Gram``.

    Padded tokens do not count. Sums are float64, over the data of all processes.
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
    values = {path: total.value for path, total in sums.items()}
    if unseen := [path for path, value in values.items() if value is None]:
        raise ValueError(f"{', '.join(unseen)} received no input: the data are empty, or the forward pass does not call it")
    return values  # type: ignore[return-value]


def pointwise(module: nn.Module) -> bool:
    """Whether the output at a position is a matrix times the input there: a Linear layer or a 1x1 convolution."""
    if isinstance(module, nn.modules.conv._ConvNd):
        one = all(k == 1 for k in module.kernel_size) and module.groups == 1 and not module.transposed
        return one and all(s == 1 for s in module.stride) and not any(module.padding if isinstance(module.padding, tuple) else ())
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2
