"""The axis of samples: a layer's first axis has to be that of the data's samples."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.network.batch import Batch
from nodelens.network.eval_mode import eval_mode
from nodelens.network.hooks import Capture, Site
from nodelens.network.layers import Layer

_WAY_OUT = "give data and modules with samples first (batch_first=True)"


class NoSampleAxisError(ValueError):
    """The first axis of some layers is not the samples. shapes: {layer: what it puts out}."""

    def __init__(self, shapes: Mapping[str, str]):
        self.shapes = shapes
        layer, shown = next(iter(shapes.items()))
        super().__init__(f"layer {layer!r} {shown}; {_WAY_OUT}, or leave it out (layers=)")


def without_samples(model: nn.Module, batch: Batch, captured: Mapping[Site, Any], optional: bool = False) -> dict[str, str]:
    """{layer: reason} where the first axis of a layer is not the samples: one sample less has to show half of it.

    The model runs again only where this is in doubt: samples share their axis with windows or frames, or a module takes time on
    the first axis and samples on the second. Raises ValueError for such a layer unless layers are ``optional``, and if a module
    that takes time first shows samples first: the data then have them on the axis of time.
    """
    time_first = [Layer(name, m) for name, m in model.named_modules() if getattr(m, "batch_first", True) is False]
    shown = {site: tensor.shape for site, tensor in captured.items() if isinstance(tensor, Tensor) and tensor.ndim}
    if len(batch) < 2 or not (time_first or any(shape[0] != 2 for shape in shown.values())):
        return {}
    again = _shapes_of_one(model, batch, [*shown, *(Site(layer, "output") for layer in time_first)])
    why = "its first axis is not the samples"
    found = {
        site.layer.name: f"puts out {tuple(again[site])} for one sample and {tuple(shape)} for two: {why}"
        for site, shape in shown.items()
        if site in again and shape[0] != 2 * again[site][0]
    }
    if found and not optional:
        raise NoSampleAxisError(found)
    for site in again.keys() - shown.keys():
        if len(again[site]) == 3 and again[site][0] == 1:
            raise ValueError(
                f"{site.layer.name!r} takes time first and samples second (batch_first=False), "
                f"but the first axis of the data is its time: {_WAY_OUT}"
            )
    return {layer: str(NoSampleAxisError({layer: shown})) for layer, shown in found.items()}


def _shapes_of_one(model: nn.Module, batch: Batch, sites: Iterable[Site]) -> dict[Site, torch.Size]:
    """The shapes at sites for the first sample alone."""
    found: dict[Site, torch.Size] = {}

    def see(site: Site, tensor: Any) -> None:
        found.setdefault(site, tensor.shape)

    capture = Capture(sites, see)
    capture.gate = True
    with eval_mode(model), torch.inference_mode(False), torch.no_grad(), capture:
        batch.head(1).map(torch.clone).run(model)
    return found
