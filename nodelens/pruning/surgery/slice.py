"""Slicing: the entries of removed units are deleted from the tensors, and modules store their new sizes."""

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nodelens.network.groups import GroupSlice, PruningGroup
from nodelens.network.open_attention import keep_open

from .mask import Removed, check_group, check_min_keep

_SIZES = {"Linear": ("out_features", "in_features"), "Conv1D": ("nx", "nf"), "Embedding": ("num_embeddings", "embedding_dim")}


def slice_units(model: nn.Module, groups: Iterable[PruningGroup], removed: Removed) -> nn.Module:
    """Removes units, {group: unit ids}, from the model in place and returns it.

    Slice a model before it is compiled or wrapped for several devices. Raises ValueError for an unknown group or unit, or a
    group that would lose all units.
    """
    groups = list(groups)
    by_name = {group.name: group for group in groups}
    for name, units in removed.items():
        check_group(by_name, name, None, units)
        if len(set(units)) >= by_name[name].n:
            raise ValueError(f"group {name!r} would lose all of its {by_name[name].n} units: keep at least one")
        check_min_keep(by_name[name], units)
    slices: dict[tuple[str, str], list[tuple[GroupSlice, np.ndarray]]] = {}
    for name, units in removed.items():
        ids = np.array(sorted(set(units)), dtype=np.int64)
        for piece in by_name[name].slices:
            slices.setdefault((piece.module, piece.tensor), []).append((piece, piece.index.numpy()[ids]))
    modules = dict(model.named_modules(remove_duplicate=False))
    for (path, tensor), pairs in slices.items():
        module = modules[path]
        replace_tensor(module, tensor, _without(getattr(module, tensor).detach(), pairs))
    for path, attributes in updated_counts(model, [by_name[name] for name in removed], removed).items():
        for attribute, value in attributes.items():
            set_count(model.get_submodule(path), attribute, value)
    paths = {path for path, _ in slices}
    for path in paths | {path.rpartition(".")[0] for path in paths if path.rpartition(".")[2] == "base_layer"}:
        _update_sizes(modules[path])  # of an adapter, too, around what it adapts
    keep_open(model, paths)
    _drop_caches(model)
    return model


def _drop_caches(model: nn.Module) -> None:
    """Modules with a train method of their own drop there what they computed from their weights for evaluation."""
    for module in model.modules():
        if type(module).train is not nn.Module.train:
            modes = {part: part.training for part in module.modules()}
            module.train()
            for part, mode in modes.items():
                part.training = mode


def updated_counts(model: nn.Module, groups: Iterable[PruningGroup], removed: Removed) -> dict[str, dict[str, int]]:
    """{module: {attribute: new value}} of counts that no tensor size gives, such as the number of heads."""
    updated: dict[str, dict[str, int]] = {}
    for group in groups:
        lost = len(set(removed.get(group.name, ())))
        for count in group.counts:
            if len({len(set(removed.get(name, ()))) for name in count.among}) > 1:
                continue
            value: Any = model.get_submodule(count.module)
            for part in count.attribute.split("."):
                value = getattr(value, part)
            of_module = updated.setdefault(count.module, {})
            of_module[count.attribute] = of_module.get(count.attribute, value) - count.step * lost
    return updated


def set_count(module: nn.Module, attribute: str, value: int) -> None:
    """Sets a module's count. A config is copied first; the module and its submodules with the same config get the copy."""
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
    """Replaces a parameter or a buffer."""
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(value, requires_grad=old.requires_grad))
    else:
        setattr(module, name, value)
        module._non_persistent_buffers_set.discard(name)  # it cannot be computed from the config any more


def update_sizes(model: nn.Module, path: str) -> None:
    """Sets the sizes that a module stores, and the adapter around it, to those of its tensors."""
    _update_sizes(model.get_submodule(path))
    around, _, name = path.rpartition(".")
    if name == "base_layer":
        _update_sizes(model.get_submodule(around))


def _update_sizes(module: nn.Module) -> None:
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


def _without(tensor: Tensor, pairs: list[tuple[GroupSlice, np.ndarray]]) -> Tensor:
    """A tensor without some positions along one or more dimensions; of experts, each without its own positions."""
    by_entry: dict[int | None, list[tuple[int, np.ndarray]]] = {}
    for piece, positions in pairs:
        by_entry.setdefault(piece.entry, []).append((piece.dim, positions))
    if None not in by_entry:
        parts = [_drop(tensor[e], [(dim - 1, at) for dim, at in by_entry.get(e, [])]) for e in range(len(tensor))]
        if len({part.shape for part in parts}) > 1:
            raise ValueError(
                "experts of one tensor would keep different numbers of units: "
                f"{', '.join(str(tuple(part.shape)) for part in parts)}; remove the same number from each"
            )
        return torch.stack(parts)
    if len(by_entry) > 1:
        raise ValueError("the plan removes whole experts and channels from one tensor: remove one, then find the groups again")
    return _drop(tensor, by_entry[None])


def _drop(tensor: Tensor, removed: Iterable[tuple[int, np.ndarray]]) -> Tensor:
    by_dim: dict[int, np.ndarray] = {}
    for dim, positions in removed:
        by_dim.setdefault(dim, np.ones(tensor.shape[dim], bool))[positions] = False
    if not by_dim:
        return tensor.contiguous().clone()
    for dim, kept in by_dim.items():
        tensor = tensor.index_select(dim, torch.from_numpy(kept.nonzero()[0]).to(tensor.device))
    return tensor
