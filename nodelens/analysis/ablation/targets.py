"""What can be ablated: the units of pruning groups and layers, and the places in tensors where each unit passes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from nodelens.engine.request import Layers, as_layers
from nodelens.messages import listed, shown
from nodelens.network.batch import Batch, read_of, tensor_of
from nodelens.network.eval_mode import eval_mode
from nodelens.network.experts import ExpertLayer
from nodelens.network.group_layer import GroupLayer
from nodelens.network.groups import PruningGroup, PruningGroups
from nodelens.network.hooks import observed
from nodelens.network.layers import Layer
from nodelens.pruning.groups.find import find_groups
from nodelens.pruning.surgery.mask import channel_dim
from nodelens.statistics.sample_hash import generator

Side = Literal["input", "output"]
Key = tuple[nn.Module, str]  # a module, and input or output
Units = Mapping[str, Sequence[int]]


@dataclass(frozen=True, eq=False)
class UnitPlace:
    """Where units pass: the tensor that a module reads or returns, its dimension of units, and each unit's (units, places)."""

    path: str
    module: nn.Module
    side: Side
    dim: int
    index: Tensor


@dataclass(frozen=True, eq=False)
class AblationTarget:
    """A pruning group, a layer's output or a layer's input, with n units.

    name: that of the group or layer. weights: a group whose units no hook can gate, so that it is masked in its weights.
    """

    name: str
    n: int
    source: Layer | PruningGroup
    places: tuple[UnitPlace, ...] = ()
    weights: PruningGroup | None = None

    @classmethod
    def of_group(cls, model: nn.Module, group: PruningGroup) -> "AblationTarget":
        if not group.gated:
            paths = [group.router] if group.router is not None else [piece.module for piece in group.by_role("consumer")]
            none = torch.zeros(group.n, 0, dtype=torch.long)
            places = [UnitPlace(path, model.get_submodule(path), "input", -1, none) for path in dict.fromkeys(paths)]
            return cls(group.name, group.n, group, tuple(places), group)
        modules = [(piece, model.get_submodule(piece.module)) for piece in group.by_role("consumer")]
        return cls(
            group.name,
            group.n,
            group,
            tuple(UnitPlace(piece.module, module, "input", channel_dim(module), piece.places) for piece, module in modules),
        )

    @classmethod
    def read_by(cls, model: nn.Module, group: PruningGroup, width: int) -> "AblationTarget":
        """What the linear layers that make a group's units read, ``width`` features, removed for these layers only."""
        paths = dict.fromkeys(piece.module for piece in group.by_role("producer"))
        index = torch.arange(width)[:, None]
        places = tuple(UnitPlace(path, model.get_submodule(path), "input", -1, index) for path in paths)
        return cls(f"{group.name}.input", width, group, places)

    @classmethod
    def of_layer(cls, layer: Layer, path: str, shown: Any) -> "AblationTarget":
        """``shown``: what the layer's module reads or returns. Raises ValueError where that has no units."""
        tensor = tensor_of(shown)
        if isinstance(layer, ExpertLayer):
            raise ValueError(
                f"layer {layer.name!r} is the hidden units of experts that share a tensor: ablate their pruning groups, "
                "layers=nl.find_groups(model)"
            )
        if tensor is None or tensor.ndim < 2:
            what = type(shown).__name__ if tensor is None else f"a tensor of shape {tuple(tensor.shape)}"
            raise ValueError(f"layer {layer.name!r} shows {what}: units need a tensor of two axes at least; leave it out")
        dim = 1 if layer.channels_second(tensor) else -1
        n = tensor.shape[dim]
        side: Side = "input" if layer.side == "input" else "output"
        return cls(layer.name, n, layer, (UnitPlace(path, layer.module, side, dim, torch.arange(n)[:, None]),))


def find_targets(
    model: nn.Module, layers: Layers | None, batch: Batch, shown: Mapping[nn.Module, tuple[Any, Any]]
) -> list[AblationTarget]:
    """The targets in ``layers``; without them, the model's pruning groups over which no norm reduces.

    shown: what each module read and returned in a pass. Raises ValueError for a layer that the pass did not call, as
    ``find_layers`` does, and for a model without groups.
    """
    if layers is None:
        return [AblationTarget.of_group(model, group) for group in _exact_groups(find_groups(model, batch))]
    paths = {module: path for path, module in model.named_modules()}
    found = []
    for layer in as_layers(model, layers):
        if isinstance(layer, GroupLayer):
            found.append(AblationTarget.of_group(model, layer.group))
        elif layer.module in shown:
            read, returned = shown[layer.module]
            target = AblationTarget.of_layer(layer, paths[layer.module], read if layer.side == "input" else returned)
            found.append(replace(target, name=layer.title))
        elif not isinstance(layers, str) or layers != "*":
            raise ValueError(f"layer {layer.name!r} was not called, so its units cannot be ablated: leave it out")
    if not found:
        raise ValueError("none of the layers was called: there is nothing to ablate")
    return found


def _exact_groups(groups: PruningGroups) -> list[PruningGroup]:
    """The groups over which no norm reduces. Raises ValueError if there are none."""
    found = [group for group in groups if group.exact]
    if not found and len(groups):
        raise ValueError(
            f"a norm reduces over the units of each pruning group, such as {groups[0].name}: layers=nl.find_groups(model, batch) "
            "zeroes them all the same, and layers='<name of a module>' ablates its output"
        )
    if not found:
        why = "; ".join(f"{f.what}: {f.reason}" for f in groups.frozen[:3]) or "it has no layers with weights"
        raise ValueError(f"the model has no pruning groups ({why}): name layers, as layers='<name of a module>'")
    return found


def calls_of(model: nn.Module, run: Callable[[], Any]) -> dict[nn.Module, tuple[Any, Any]]:
    """What each module read and returned at its first call in a pass."""
    shown: dict[nn.Module, tuple[Any, Any]] = {}

    def see(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        shown.setdefault(module, (read_of(args, kwargs), output))

    with torch.inference_mode(False), eval_mode(model), torch.no_grad(), observed(model.modules(), see):
        run()
    return shown


def targets_of_table(
    model: nn.Module, counts: Mapping[str, int], batch: Batch, shown: Mapping[nn.Module, tuple[Any, Any]]
) -> tuple[list[AblationTarget], list[dict[str, str]]]:
    """The pruning group of each name, where it has as many units, else the layer of that name; and what is neither, and why."""
    try:
        groups = {group.name: group for group in find_groups(model, batch)}
    except ValueError:  # its graph cannot be exported: layers can be ablated without
        groups = {}
    targets, missing = [], []
    for name, n in counts.items():
        own = [groups[name]] if name in groups and groups[name].n == n else name
        try:
            found = find_targets(model, own, batch, shown)
            if len(found) != 1 or found[0].n != n:
                raise ValueError(f"{name!r} has {n} units in the table and {sum(t.n for t in found)} in the model")
            targets += found
        except ValueError as error:
            missing.append({"layer": name, "what": "damage", "reason": str(error)})
    return targets, missing


def chosen_units(targets: Sequence[AblationTarget], units: Any, sample: int | None, seed: int) -> dict[str, list[int]]:
    """{target: ids}: the units given, else ``sample`` of each target drawn from the seed, else all.

    units: {layer: ids}, or a table or index with the levels layer and unit. Raises ValueError for a layer or unit that is not
    there, for both a list and a sample, and for a sample that is no number of units.
    """
    by_name = {target.name: target for target in targets}
    if units is not None and sample is not None:
        raise ValueError("both units= and sample= are given: units names the units to ablate, sample draws them; give one of them")
    if units is None:
        return sample_units([(target.name, target.n) for target in targets], "all" if sample is None else sample, seed)
    found: dict[str, list[int]] = {}
    for name, ids in as_mapping(units).items():
        check_units(by_name, name, ids)
        found[name] = ids
    return found


def as_mapping(units: Any) -> dict[str, list[int]]:
    """{layer: ids}, each id once, of a mapping, of a table with the index (layer, unit), or of such an index.

    Raises ValueError for units that are no integers, such as a mask.
    """
    if isinstance(units, Mapping):
        return {str(name): _ids(str(name), ids) for name, ids in units.items()}
    index = units.index if isinstance(units, (pd.DataFrame, pd.Series)) else units
    if not isinstance(index, pd.MultiIndex) or index.nlevels != 2:
        raise ValueError(f"units is {type(units).__name__}; it is {{layer: [units]}}, or a table such as result.units")
    found: dict[str, list[Any]] = {}
    for name, unit in index:
        found.setdefault(str(name), []).append(unit)
    return {name: _ids(name, ids) for name, ids in found.items()}


def _ids(name: str, given: Any) -> list[int]:
    ids = np.asarray(given.cpu() if isinstance(given, torch.Tensor) else given).reshape(-1)
    if ids.dtype.kind == "b":
        raise ValueError(f"the units of {name!r} are booleans; they are ids, as np.flatnonzero(mask) gives them")
    if len(ids) and ids.dtype.kind not in "iu":
        raise ValueError(f"the units of {name!r} are {shown(ids.tolist())}; they are integers from 0 on, such as [0, 3]")
    return list(dict.fromkeys(ids.tolist()))


def check_units(by_name: Mapping[str, AblationTarget], name: str, ids: Sequence[int]) -> None:
    """Raises ValueError for a layer that is not there, or units that it does not have."""
    if name not in by_name:
        raise ValueError(f"units names {name!r}; the layers are {listed(list(by_name))}")
    n = by_name[name].n
    wrong = [unit for unit in ids if not 0 <= unit < n]
    if wrong:
        raise ValueError(f"{name!r} has {n} units, 0 to {n - 1}; units names unit {wrong[0]}")


def sample_units(layers: Iterable[tuple[str, int]], count: int | str, seed: int = 0) -> dict[str, list[int]]:
    """{layer: ids} of ``all`` units, or of ``count`` units per layer, drawn uniformly without replacement from the seed.

    Raises ValueError for a count that is neither "all" nor a number >= 0.
    """
    if count != "all" and (isinstance(count, (bool, str)) or not isinstance(count, int) or count < 0):
        raise ValueError(f"the sample of units is {count!r}; it is a number of units per layer, or all")
    found = {}
    for name, n in layers:
        order = torch.randperm(n, generator=generator(seed, "ablate", name))
        found[name] = sorted(order[: n if isinstance(count, str) else count].tolist())
    return found
