"""Moments of the consumers' inputs over the calibration data."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.engine.driver import Driver, Progress, device_of, opened
from nodelens.network.batch import Batch
from nodelens.network.groups import PruningGroup
from nodelens.network.hooks import Capture, Site
from nodelens.network.layers import Layer
from nodelens.network.objective import Objective
from nodelens.statistics import Accumulator, Gram, Moments
from nodelens.statistics.processes import reduce_sums
from nodelens.statistics.rows import Rows


def input_moments(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    data: Iterable[Any],
    products: bool = False,
    progress: Progress = iter,
) -> dict[str, Moments | Gram]:
    """{path of a consumer: moments of its input}; with ``products``, Linear layers and 1x1 convolutions get a ``Gram``.

    Padded tokens do not count. Sums are float64, over the data of all processes.
    """
    paths = list(dict.fromkeys(piece.module for group in groups for piece in group.by_role("consumer") if piece.entry is None))
    inputs = _Inputs([Layer(path, model.get_submodule(path), "input") for path in paths], products)
    capture = Capture([Site(layer, "output") for layer in inputs.layers], inputs.see)
    objective, data = opened(model, data, Objective.of(model))
    Driver(model, objective, answers=False, progress=progress).run(data, inputs, capture)
    reduce_sums(inputs.sums, device_of(model))
    values = {path: total.value for path, total in inputs.sums.items()}
    if unseen := [path for path, value in values.items() if value is None]:
        raise ValueError(f"{', '.join(unseen)} received no input: the data are empty, or the forward pass does not call it")
    return values  # type: ignore[return-value]


class _Inputs:
    """Adds what each layer reads to its moments, about the mean of the first batch."""

    def __init__(self, layers: Sequence[Layer], products: bool):
        self.layers = layers
        kinds = {layer.name: Gram if products and pointwise(layer.module) else Moments for layer in layers}
        self.sums = {name: Accumulator(kind) for name, kind in kinds.items()}
        self.shifts: dict[str, Tensor] = {}

    def begin(self, batch: Batch) -> None:
        self.batch = batch

    def see(self, site: Site, tensor: Tensor) -> None:
        rows = site.layer.rows(tensor, len(self.batch), self.batch.mask_at(f"{site.layer.name}.input"))
        rows = Rows(rows.raw, rows.keep, torch.zeros(rows.raw.shape[1], dtype=torch.float64, device=tensor.device)).finite()
        shift = self.shifts.setdefault(site.layer.name, rows.mean)
        self.sums[site.layer.name].add_rows(rows.about(shift))

    def end(self, predictions: Tensor | None) -> None:
        pass


def pointwise(module: nn.Module) -> bool:
    """Whether the output at a position is a matrix times the input there: a Linear layer or a 1x1 convolution."""
    if isinstance(module, nn.modules.conv._ConvNd):
        one = all(k == 1 for k in module.kernel_size) and module.groups == 1 and not module.transposed
        return one and all(s == 1 for s in module.stride) and not any(module.padding if isinstance(module.padding, tuple) else ())
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2
