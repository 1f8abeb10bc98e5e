"""A plan applied for good: tensors lose the removed units' entries, and modules know their new sizes."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.network.groups import GroupSlice, PruningGroup

from .mask import Removed, check_group, check_min_keep

_SIZES = {"Linear": ("out_features", "in_features"), "Conv1D": ("nx", "nf"), "Embedding": ("num_embeddings", "embedding_dim")}


def slice_units(model: nn.Module, groups: Iterable[PruningGroup], removed: Removed) -> nn.Module:
    """Removes units from the model itself and returns it: {group: unit ids}.

    Slice before the model is compiled or wrapped for several devices. Raises ValueError for a group or a unit that is not
    there, or a group that would lose its last unit.
    """
    groups = list(groups)
    by_name = {group.name: group for group in groups}
    for name, units in removed.items():
        check_group(by_name, name, None, units)
        if len(set(units)) >= by_name[name].n:
            raise ValueError(f"group {name!r} would lose all of its {by_name[name].n} units: one has to stay")
        check_min_keep(by_name[name], units)
    slices: dict[tuple[str, str], list[tuple[GroupSlice, Tensor]]] = {}
    for name, units in removed.items():
        gone = torch.tensor(sorted(set(units)), dtype=torch.long)
        for piece in by_name[name].slices:
            slices.setdefault((piece.module, piece.tensor), []).append((piece, piece.index[gone].flatten()))
    for (path, tensor), pairs in slices.items():
        module = model.get_submodule(path)
        replace_tensor(module, tensor, _without(getattr(module, tensor).detach(), pairs))
    for path, attributes in updated_counts(model, [by_name[name] for name in removed], removed).items():
        for attribute, value in attributes.items():
            set_number(model.get_submodule(path), attribute, value)
    for path in {path for path, _ in slices}:
        refit(model.get_submodule(path))
    return model


def updated_counts(model: nn.Module, groups: Iterable[PruningGroup], removed: Removed) -> dict[str, dict[str, int]]:
    """{module: {attribute: new value}} of what tensors do not tell, such as the number of heads."""
    found: dict[str, dict[str, int]] = {}
    for group in groups:
        gone = len(set(removed.get(group.name, ())))
        for patch in group.counts:
            if len({len(set(removed.get(name, ()))) for name in patch.among}) > 1:
                continue
            held: Any = model.get_submodule(patch.module)
            for part in patch.attribute.split("."):
                held = getattr(held, part)
            here = found.setdefault(patch.module, {})
            here[patch.attribute] = here.get(patch.attribute, held) - patch.step * gone
    return found


def set_number(module: nn.Module, attribute: str, value: int) -> None:
    """Sets a module's number; one of a config in a copy that is the module's own, and that of its parts which had the same."""
    holder, _, field = attribute.rpartition(".")
    if holder:
        old = getattr(module, holder)
        new = copy.copy(old)
        setattr(new, field, value)
        for part in module.modules():
            if getattr(part, holder, None) is old:
                setattr(part, holder, new)
    else:
        setattr(module, field, value)


def replace_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Puts a tensor in the place of a parameter or a buffer."""
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(value, requires_grad=old.requires_grad))
    else:
        setattr(module, name, value)


def refit(module: nn.Module) -> None:
    """Sets the sizes that a module keeps beside its tensors to what these are."""
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, nn.modules.conv._ConvNd):
        first, second = ("in", "out") if module.transposed else ("out", "in")
        sizes = {first: weight.shape[0], second: weight.shape[1] * module.groups}
        module.in_channels, module.out_channels = sizes["in"], sizes["out"]
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = len(weight)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(weight)
    elif isinstance(getattr(module, "normalized_shape", None), tuple):
        module.normalized_shape = tuple(weight.shape)  # type: ignore[assignment]
    else:
        for attribute, size in zip(_SIZES.get(type(module).__name__, _SIZES["Linear"]), weight.shape, strict=False):
            if hasattr(module, attribute):
                setattr(module, attribute, size)


def _without(tensor: Tensor, pairs: list[tuple[GroupSlice, Tensor]]) -> Tensor:
    """A tensor without some places in each of several dimensions; experts each without their own."""
    by_entry: dict[int | None, list[tuple[int, Tensor]]] = {}
    for piece, gone in pairs:
        by_entry.setdefault(piece.entry, []).append((piece.dim, gone))
    if None not in by_entry:
        parts = [_dropped(tensor[e], [(dim - 1, gone) for dim, gone in by_entry.get(e, [])]) for e in range(len(tensor))]
        if len({part.shape for part in parts}) > 1:
            raise ValueError(
                "experts of one tensor would keep different numbers of units: "
                f"{', '.join(str(tuple(part.shape)) for part in parts)}; remove as many from each"
            )
        return torch.stack(parts)
    if len(by_entry) > 1:
        raise ValueError("whole experts and channels of experts would go from one tensor: remove one, then find the groups again")
    return _dropped(tensor, by_entry[None])


def _dropped(tensor: Tensor, gone: Iterable[tuple[int, Tensor]]) -> Tensor:
    by_dim: dict[int, list[Tensor]] = {}
    for dim, places in gone:
        by_dim.setdefault(dim, []).append(places)
    for dim, lists in by_dim.items():
        stays = torch.ones(tensor.shape[dim], dtype=torch.bool)
        stays[torch.cat(lists)] = False
        tensor = tensor.index_select(dim, stays.nonzero()[:, 0].to(tensor.device))
    return tensor.contiguous().clone()
