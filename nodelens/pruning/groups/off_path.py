"""Parameters that no traced forward pass reads: their modules keep their width, and so do the channels that they may read."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from nodelens.network.groups import Frozen

from .graph_ids import Ids


def unread(model: nn.Module, read: Collection[int]) -> dict[str, list[nn.Parameter]]:
    """{path of a module: its own parameters that are not among those read, which are given by their ids}.

    A bias does not count where the weight is read: it says nothing about what reads the weight.
    """
    left = {}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        known = {name for name, p in own.items() if id(p) in read}
        left[path] = [p for name, p in own.items() if name not in known and not (name == "bias" and "weight" in known)]
    return {path: parameters for path, parameters in left.items() if parameters}


def freeze_unread(ids: Ids, model: nn.Module, left: Mapping[str, Sequence[nn.Parameter]], why: str = "") -> None:
    """Freezes and names modules with parameters that no forward pass reads, and channels of the width that they read.

    Code outside the forward pass may call such a module on what a group makes, which only its width can tell.
    """
    for path, parameters in left.items():
        module = model.get_submodule(path)
        name, widths = path or type(module).__name__, _widths(module, parameters)
        ids.report.append(Frozen(name, f"no forward pass reads its parameters{why}: they keep their shapes"))
        reason = f"{name} ({type(module).__name__}) may read them, but no forward pass shows what it reads{why}"
        for place in list(ids.places.values()):
            if len(place.ids) in widths:
                ids.freeze(place.ids, reason)


def _widths(module: Any, parameters: Sequence[nn.Parameter]) -> set[int]:
    """Numbers of channels that a module may read."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return {module.in_channels} - {1}
    if isinstance(module, nn.Linear):
        return {module.in_features} - {1}
    return {size for p in parameters for size in p.shape} - {1}
