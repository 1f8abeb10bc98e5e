"""What a plan has to know of derivatives before the data are read, from one recorded forward pass of two samples."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nodelens.network.batch import Batch
from nodelens.network.eval_mode import eval_mode
from nodelens.network.experts import ExpertLayer
from nodelens.network.group_layer import GroupLayer
from nodelens.network.hooks import Capture, Site
from nodelens.network.layers import ASSOCIATION, Layer
from nodelens.network.objective import Objective
from nodelens.network.tail import smooth_operations
from nodelens.network.traced import Traced

from .association_methods import Facts
from .driver import graph_starts, twice_differentiable, with_gradients
from .graph_start import GraphStart


def facts_of(model: nn.Module, layers: Iterable[Layer], batch: Batch, objective: Objective) -> Facts:
    """The operations behind each layer, and the number of vectors that the inputs span."""
    captured: dict[str, list[Traced]] = {}
    embedded: list[Tensor] = []
    own = [layer for layer in layers if not isinstance(layer, (GroupLayer, ExpertLayer))]
    capture = Capture(
        [Site(layer, ASSOCIATION) for layer in own], lambda site, seen: captured.setdefault(site.layer.name, []).append(seen)
    )
    capture.gate = True
    batch = with_gradients(batch.head(2).map(torch.clone))
    modes = torch.inference_mode(False), eval_mode(model), torch.enable_grad()
    with modes[0], modes[1], modes[2], graph_starts(model, embedded), twice_differentiable(), capture:
        z = objective.run(model, batch)
    smooth = {name: _smooth(z, calls) for name, calls in captured.items()}
    edges = [call.edge for calls in captured.values() for call in calls if call.edge is not None]
    start = GraphStart.of(edges, embedded, batch) if edges else None
    return Facts(smooth, 0 if start is None else start.count)


def _smooth(z: Tensor, calls: list[Traced]) -> list[str] | None:
    """The operations behind any of the calls of a layer that are not piecewise linear; None if no call reaches the predictions."""
    found = [None if call.edge is None else smooth_operations(z, call.edge) for call in calls]
    if all(each is None for each in found):
        return None
    return list(dict.fromkeys(name for each in found for name in each or ()))
