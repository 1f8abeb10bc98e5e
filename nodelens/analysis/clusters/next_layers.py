"""Which layers read the units of a layer, and by which weights: found from the data flow, not from the order of the modules."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nodelens.engine.analyze import analyze
from nodelens.engine.driver import device_of, shared_first
from nodelens.metrics import get_metric
from nodelens.metrics.fanout import input_sizes
from nodelens.network.batch import Batch
from nodelens.network.eval_mode import eval_mode
from nodelens.network.groups import GroupSlice, PruningGroups
from nodelens.network.hooks import observed
from nodelens.network.layers import Layer
from nodelens.network.objective import Objective
from nodelens.pruning.groups.find import find_groups

_BY_ATTENTION = ("head", "kv_group")


class ReadUnits(NamedTuple):
    """Which units of a layer a weight reads, and where they lie in its input."""

    units: Tensor  # (read units,) int64: numbers in the layer
    places: Tensor  # (read units, places) int64: positions in the input


@dataclass(frozen=True, eq=False)
class NextLayer:
    """A layer, and one that reads its units."""

    layer: str
    next: str
    readings: tuple[ReadUnits, ...]

    def influence(self, model: nn.Module, units: int, deviation: Tensor | None) -> Tensor:
        """Influence of each unit on each output of the next layer, (receivers, units) float64.

        Formula: I_ji = sum over the kernel and the places of unit i of |W_jp| sd(x_p), x the input of the next layer

        deviation: sd of the input, (inputs,); None: 1.
        """
        module = model.get_submodule(self.next)
        sizes = input_sizes(module)  # (receivers, inputs)
        sizes = sizes if deviation is None else sizes * deviation
        found = torch.zeros(len(sizes), units, dtype=torch.float64)
        for reading in self.readings:
            found[:, reading.units] += sizes[:, reading.places].sum(2)
        return found


def next_layers(
    model: nn.Module, data: Iterable[Any], layers: Sequence[str], **objective: Any
) -> tuple[list[NextLayer], dict[str, str]]:
    """The layers that read the units of each layer, and {layer: reason} for those without one.

    A layer that is named by its input, such as ``fc2.input``, is read by that module. Others are followed through activations,
    norms, pooling, additions, concatenations and flattening, as pruning groups are; a reader that runs before the layer does not
    count. Depthwise convolutions are passed through like norms. If ``find_groups`` cannot follow the model, its message is the
    reason. Raises ValueError for empty data.
    """
    settings = Objective.of(model, objective.get("output"), objective.get("task"), objective.get("loss"))
    first, _ = shared_first(data, settings)
    if first is None:
        raise ValueError("the data are empty: not one batch to follow the units with")
    batch = settings.batch(first).head(2).to(device_of(model))
    modules = dict(model.named_modules())
    own = [name for name in layers if name not in modules and name.removesuffix(".input") in modules]
    found = [_of_input(model, name) for name in own]
    others = [name for name in layers if name in modules]
    reasons = {name: "it is no module whose readers can be followed" for name in layers if name not in own and name not in others}
    if others:
        try:
            groups, calls = find_groups(model, batch), call_order(model, batch)
        except ValueError as error:  # a model that cannot be exported; layers named by their input need no groups
            reasons |= dict.fromkeys(others, f"the layers that read its units are not known: {error}")
            others = []
        for name in others:
            readers = _readers(model, groups, name, calls)
            found += [NextLayer(name, reader, tuple(readings)) for reader, readings in readers.items()]
            if not readers:
                reasons[name] = _reason(groups, name)
    order = {name: k for k, name in enumerate(layers)}
    return sorted(found, key=lambda pair: order[pair.layer]), reasons


def deviations(
    model: nn.Module, data: Iterable[Any], names: Sequence[str], seed: int = 0, progress: Any = iter, **options: Any
) -> dict[str, Tensor]:
    """Standard deviation (ddof 0) of each input of the named modules over all rows, {module: (inputs,) float64}, in one pass."""
    inputs = [Layer(f"{name}.input", model.get_submodule(name), "input") for name in names]
    result = analyze(
        model, data, {"variance": get_metric("activation_variance")}, inputs, groups=1, seed=seed, progress=progress, **options
    )
    rows = {row["layer"]: row["rows"] for row in result.metadata["rows"]}
    found = {}
    for layer in inputs:
        n = rows[layer.name]
        variance = torch.tensor(result.units.loc[layer.name, "variance"].to_numpy(float))
        found[layer.name.removesuffix(".input")] = (variance * (n - 1) / n).sqrt()
    return found


def call_order(model: nn.Module, batch: Batch) -> Mapping[str, tuple[int, int]]:
    """{module: number of its first and of its last call} of a forward pass."""
    calls: dict[str, tuple[int, int]] = {}
    names, clock = {module: name for name, module in model.named_modules()}, itertools.count()

    def see(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        name, now = names[module], next(clock)
        calls[name] = (calls.get(name, (now,))[0], now)

    with eval_mode(model), torch.no_grad(), observed(list(names), see):
        batch.run(model)
    return calls


def _of_input(model: nn.Module, name: str) -> NextLayer:
    reader = name.removesuffix(".input")
    width = input_sizes(model.get_submodule(reader)).shape[1]
    every = torch.arange(width)
    return NextLayer(name, reader, (ReadUnits(every, every[:, None]),))


def _readers(
    model: nn.Module, groups: PruningGroups, name: str, calls: Mapping[str, tuple[int, int]]
) -> dict[str, list[ReadUnits]]:
    """{module that reads units of a layer: which it reads}."""
    found: dict[str, list[ReadUnits]] = {}
    for group in groups:
        made = [piece for piece in group.by_role("producer", "tied") if piece.module == name and piece.tensor == "weight"]
        if not made or made[0].entry is not None or group.kind in _BY_ATTENTION:
            continue
        coupled = any(
            getattr(model.get_submodule(piece.module), "groups", 1) > 1 for piece in group.by_role("producer", "consumer")
        )
        for reader in group.by_role("consumer"):
            after = reader.module in calls and name in calls and calls[reader.module][1] > calls[name][0]
            if after and reader.entry is None and reader.module != name:
                found.setdefault(reader.module, []).extend(part for piece in made for part in _parts(piece, reader, coupled))
    return {reader: readings for reader, readings in found.items() if readings}


def _parts(made: GroupSlice, reader: GroupSlice, coupled: bool) -> list[ReadUnits]:
    """What a weight reads of a layer.

    coupled: grouped convolutions couple channels to units; each channel then has a block of the unit's places. Otherwise, several
    channels of a unit meet in one place, as a gate and what it multiplies do. Nothing where neither is known.
    """
    channels, places = made.index.shape[1], reader.places.shape[1]
    if channels == 1 or places == 1:
        return [ReadUnits(channel, reader.places) for channel in made.index.T]
    if not coupled or places % channels:
        return []
    blocks = reader.places.unflatten(1, (channels, -1)).unbind(1)
    return [ReadUnits(channel, block) for channel, block in zip(made.index.T, blocks, strict=True)]


def _reason(groups: PruningGroups, name: str) -> str:
    """Why no layer is known that reads the units of a layer."""
    kinds = {group.kind for group in groups if any(piece.module == name for piece in group.by_role("producer"))}
    if kinds & set(_BY_ATTENTION):
        return "its units are mixed by attention: no weights lead from them to the next layer"
    frozen = next((f.reason for f in groups.frozen if f.what in (name, f"{name}.weight")), None)
    return f"no layer is known that reads its units{f': {frozen}' if frozen else ''}"
