"""Adapters of low rank in a graph: their ranks are no units, and what does not run keeps the widths of what runs in its place."""

from collections.abc import Collection, Iterable
from dataclasses import replace

from torch import nn

from nodelens.network.adapters import adapters_of, idle_axes, in_adapter, is_rank, tensor_at
from nodelens.network.groups import Frozen, PruningGroup

from .graph_ids import Ids, Place

RANKS = "the ranks of an adapter (LoRA) are no units of the network; the adapter is sliced along with the layer beside it"


def tie_idle(ids: Ids, model: nn.Module, read: Collection[int]) -> set[int]:
    """Ties adapters and saved copies that do not run to the layers that run in their place; returns the parameters' ids."""
    tied = set[int]()
    for idle, live in idle_axes(model):
        tensor, place = tensor_at(model, idle), ids.places.get(live)
        if id(tensor) in read or id(tensor_at(model, live)) not in read:
            continue
        tied.add(id(tensor))
        if place is not None and len(place.ids) == tensor.shape[idle[2]]:
            ids.put(Place(*idle, place.ids, "tied"))
    return tied


def freeze_ranks(ids: Ids, model: nn.Module) -> None:
    """Freezes the ranks of adapters; their outputs beside a base layer are units of that layer, which alone makes them."""
    for key, place in list(ids.places.items()):
        if place.is_count or not in_adapter(f"{place.module}.{place.tensor}"):
            continue
        if is_rank(*key, tuple(tensor_at(model, key).shape)):
            ids.freeze(place.ids, RANKS)
        elif place.role == "producer" and hasattr(_wrapper(model, place.module), "base_layer"):
            ids.places[key] = replace(place, role="tied")


def adapters_in_the_way(model: nn.Module, groups: Iterable[PruningGroup]) -> list[Frozen]:
    """The first layer that is in no group and has an adapter of another kind, with what to do and how many more there are."""
    sliced, found = {piece.module for group in groups for piece in group.slices}, list[Frozen]()
    for path, module in model.named_modules():
        base = f"{path}.base_layer".lstrip(".")
        if "base_layer" not in module._modules or base in sliced:
            continue
        try:
            adapters_of(module)
        except ValueError as error:
            found.append(Frozen(path or type(model).__name__, str(error)))
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return [replace(each, what=f"{each.what}{more}") for each in found[:1]]


def _wrapper(model: nn.Module, path: str) -> nn.Module:
    """The module two levels above, of ``lora_B.default``; the model itself if there is none."""
    return model.get_submodule(".".join(path.split(".")[:-2]))
