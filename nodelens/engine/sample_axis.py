"""The axis of samples: a layer's first axis has to be that of the data's samples."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.messages import first_line
from nodelens.network.batch import Batch
from nodelens.network.eval_mode import eval_mode
from nodelens.network.hooks import Capture, Site
from nodelens.network.layers import Layer
from nodelens.network.objective import Objective
from nodelens.network.sharded import class_name

_WAY_OUT = "give data and modules with samples first (batch_first=True)"
_VERBS = {"input": "reads", "output": "puts out"}
_WORDS = {1: ("one sample", "two"), 2: ("two samples", "three")}


class NoSampleAxisError(ValueError):
    """The first axis of some layers is not the samples. shapes: {layer: what it puts out}."""

    def __init__(self, shapes: Mapping[str, str]):
        self.shapes = shapes
        layer, shown = next(iter(shapes.items()))
        super().__init__(f"layer {layer!r} {shown}; {_WAY_OUT}, or leave it out (layers=)")


def without_samples(model: nn.Module, batch: Batch, captured: Mapping[Site, Any], optional: bool = False) -> dict[str, str]:
    """{layer: reason} where the first axis of a layer does not grow with the samples.

    batch: one or two samples, of which ``captured`` shows what passed. The model runs again with the first sample repeated: one
    size is not enough, because as many positions, windows or rows of a table look the same. Raises ValueError for such a layer
    unless layers are ``optional``, and if a module that takes time first shows samples first: the data then have them on the axis
    of time.
    """
    size = len(batch)
    shown = {site: tensor.shape for site, tensor in captured.items() if isinstance(tensor, Tensor) and tensor.ndim}
    time_first = [Layer(name, m) for name, m in model.named_modules() if getattr(m, "batch_first", True) is False]
    timed = [Site(layer, "output") for layer in time_first]
    try:
        again = _shapes(model, batch.map(lambda tensor: torch.cat([tensor, tensor[:1]])), [*shown, *timed])
    except Exception as error:  # no other size to compare with
        cause = first_line(error).rstrip(".")
        warnings.warn(
            f"{class_name(model)} takes batches of {size} but not of {size + 1} samples ({cause}): "
            "that the first axis of each layer is the samples is not checked",
            stacklevel=2,
        )
        return {}
    few, more = _WORDS[size]
    found = {
        site.layer.name: f"{_VERBS[site.port]} {tuple(shape)} for {few} and {tuple(again[site])} for {more}: "
        "its first axis is not the samples"
        for site, shape in shown.items()
        if site in again and (not again[site] or shape[0] * (size + 1) != again[site][0] * size)
    }
    if found and not optional:
        raise NoSampleAxisError(found)
    before = _shapes(model, batch, timed) if timed else {}
    for site, shape in before.items():
        if len(shape) == 3 and shape[0] == size and again[site][0] == size + 1:
            raise ValueError(
                f"{site.layer.name!r} takes time first and samples second (batch_first=False), "
                f"but the first axis of the data is its time: {_WAY_OUT}"
            )
    return {layer: str(NoSampleAxisError({layer: shown})) for layer, shown in found.items()}


def warn_of_shared(model: nn.Module, batch: Batch, objective: Objective) -> None:
    """Warns if an input with one row per sample may be shared by all of them: the samples then have other predictions without it.

    The rows of such an input are counted as samples where a batch is cut into parts. Without such inputs nothing is run.
    """
    names = batch.coincident
    if len(batch) < 3 or not names:
        return
    try:
        with eval_mode(model), torch.inference_mode(False), torch.no_grad():
            few, every = (objective.answer(part.run(model)).double() for part in (batch.head(2), batch))
    except Exception:  # a forward pass may raise anything, which the pass over the data names; or no predictions can be read
        return
    same = few.shape == every[: len(few)].shape and torch.allclose(
        few, every[: len(few)], rtol=1e-3, atol=1e-3 * float(few.abs().max())
    )
    if not same:
        warnings.warn(
            f"the predictions of the first two samples change with the others in the batch: if {' or '.join(names)}, which has "
            f"{len(batch)} rows for {len(batch)} samples, is shared by all of them, give batches of another size, or keep it "
            "in the model",
            stacklevel=2,
        )


def _shapes(model: nn.Module, batch: Batch, sites: Iterable[Site]) -> dict[Site, torch.Size]:
    """The shapes at sites, at the first call of each."""
    found: dict[Site, torch.Size] = {}

    def see(site: Site, tensor: Any) -> None:
        if isinstance(tensor, Tensor):
            found.setdefault(site, tensor.shape)

    capture = Capture(sites, see)
    capture.gate = True
    with eval_mode(model), torch.inference_mode(False), torch.no_grad(), capture:
        batch.map(torch.clone).run(model)
    return found
