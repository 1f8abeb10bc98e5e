"""The report of a plan: bytes, operations, time and place, in plain numbers."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from nodelens.engine.buffered import buffer_bytes, held, held_bytes
from nodelens.engine.plan import Plan
from nodelens.engine.several_passes import divided
from nodelens.network.roles import roles_of

from .placement import Placement


@dataclass(frozen=True)
class Machine:
    """What a pass will run on, and for how long.

    devices: that share one copy of the model, in order; memory: bytes of each, None for any; ranks: processes, each with such a
    copy and its share of the data; hours: in which it shall end
    """

    devices: int = 1
    memory: float | None = None
    ranks: int = 1
    hours: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and (value <= 0 or (name in ("devices", "ranks") and value != int(value))):
                raise ValueError(f"cost.{name} is {value}; it is a number above 0, devices and ranks whole ones")


@dataclass(frozen=True)
class Forecast:
    """What a pass will take. Bytes are exact sums of tensors, buffers at most; operations are two a multiply-add.

    model:      class, dtype, parameters, bytes (buffers included), blocks
    sites:      a layer each: width, statistics (names), bytes of sums, bytes of buffers, device (None: there is no room)
    statistics: the plan's own rows, complete
    bytes:      statistics, buffers (rows that wait for company), total; what the forward itself takes is not in it
    forward:    flops a sample and a row, overhead (a share of forward, or of forward and backward with ``gradients``)
    rate:       rows to read (tokens, of images samples), in so many hours: rows, samples and operations a second, of all ranks
    passes:     over the data, each with its layers and bytes, as few as fit into ``budget``; empty where one layer does not
    devices:    each with its blocks, bytes of weights, statistics and buffers (of the largest pass), and whether they fit
    ranks:      processes, bytes on each, rows that each reads, bytes that the sum over all moves
    refused:    why the pass would not start as it is; empty where it would
    """

    model: dict[str, Any]
    sites: list[dict[str, Any]]
    statistics: list[dict[str, Any]]
    bytes: dict[str, int]
    forward: dict[str, Any]
    rate: dict[str, Any]
    passes: list[dict[str, Any]]
    devices: list[dict[str, Any]]
    ranks: dict[str, Any]
    budget: float | None = None
    refused: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """Dictionaries, lists, numbers and words."""
        return asdict(self)


def report(
    net: nn.Module,
    plan: Plan,
    rows: int,
    per_sample: int,
    machine: Machine,
    budget: float | None = None,
    passes: int = 1,
    extra: Mapping[str, int] | None = None,
    refused: Sequence[str] = (),
) -> Forecast:
    """The report of a plan.

    rows: how many are to be read, ``per_sample`` of each sample; extra: bytes that wait at a layer beside those of the plan
    """
    place = Placement.of(net, machine.devices, math.inf if machine.memory is None else machine.memory)
    parts, words = _passes(plan, budget, passes)
    sums, buffers = sizes(plan, extra or {})
    on = {layer.name: place.device_of(layer) for layer in plan.layers}
    forward = _forward(plan, per_sample)
    total = {"statistics": sum(sums.values()), "buffers": sum(buffers.values())}
    devices = _devices(place, machine.memory, parts or [plan], on, extra or {})
    return Forecast(
        model=_model(net),
        sites=_sites(plan, sums, buffers, on),
        statistics=plan.rows(),
        bytes=total | {"total": sum(total.values())},
        forward=forward,
        rate=_rate(forward, rows, machine.hours, max(1, len(parts))),
        passes=[{"layers": [layer.name for layer in part.measured], "bytes": part.total_bytes} for part in parts],
        devices=devices,
        ranks={
            "ranks": machine.ranks,
            "bytes": sum(d["weights"] + d["statistics"] + d["buffers"] for d in devices),
            "rows": math.ceil(rows / machine.ranks),
            "all_reduce_bytes": total["statistics"] if machine.ranks > 1 else 0,
        },
        budget=budget,
        refused=[*refused, *words],
    )


def sizes(plan: Plan, extra: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """({layer: bytes of its sums}, {layer: bytes of rows that wait there}); in all the plan's ``total_bytes``, and ``extra``."""
    sums, buffers = Counter[str](), Counter(extra)
    for row in plan.rows():
        sums[row["layer"]] += row["bytes"]
    for site in plan.sites():
        buffers[site.layer.name] += buffer_bytes(plan, site)
    for site in held(plan):
        buffers[site.layer.name] += held_bytes(plan, site)
    return dict(sums), dict(buffers)


def _passes(plan: Plan, budget: float | None, allowed: int) -> tuple[list[Plan], list[str]]:
    """As few passes as fit into a budget, and what speaks against them."""
    try:
        parts = divided(plan, budget, max(1, len(plan.layers)))
    except MemoryError as error:
        return [], [str(error)]
    if len(parts) <= allowed:
        return parts, []
    return parts, [
        f"budget.max_passes is {allowed}, and it takes {len(parts)}: set budget.max_passes={len(parts)}, or a larger budget.memory"
    ]


def _model(net: nn.Module) -> dict[str, Any]:
    parameters = list(net.parameters())
    kinds = Counter({p.dtype: 0 for p in parameters})
    for p in parameters:
        kinds[p.dtype] += p.numel()
    return {
        "class": type(net).__name__,
        "dtype": ", ".join(str(kind).removeprefix("torch.") for kind, _ in kinds.most_common()),
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(t.nbytes for t in itertools.chain(parameters, net.buffers())),
        "blocks": len(roles_of(net).blocks),
    }


def _sites(plan: Plan, sums: Mapping[str, int], buffers: Mapping[str, int], on: Mapping[str, int | None]) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer.name,
            "width": plan.seen(layer, "output").width,
            "statistics": [str(need) for need in plan.needs(layer)],
            "bytes": sums.get(layer.name, 0),
            "buffers": buffers.get(layer.name, 0),
            "device": on[layer.name],
        }
        for layer in plan.layers
    ]


def _forward(plan: Plan, tokens: int) -> dict[str, Any]:
    """Operations of the model alone, and what share of them the statistics cost beside."""
    return {
        "flops_per_sample": plan.dry_run.flops,
        "flops_per_row": plan.dry_run.flops / tokens,
        "rows_per_sample": tokens,
        "row": "token" if plan.dry_run.tokens else "sample",
        "gradients": plan.gradients,
        "overhead": plan.overhead(),
    }


def _rate(forward: Mapping[str, Any], rows: int, hours: float, passes: int) -> dict[str, Any]:
    """What it takes to end in time: the model runs once a pass, every statistic is added up in one of them."""
    seconds, bare = 3600 * hours, forward["flops_per_row"] * (3 if forward["gradients"] else 1)
    return {
        "rows": rows,
        "hours": hours,
        "forwards": passes,
        "rows_per_second": rows * passes / seconds,
        "samples_per_second": rows * passes / seconds / forward["rows_per_sample"],
        "flops": rows * bare * (passes + forward["overhead"]),
        "flops_per_second": rows * bare * (passes + forward["overhead"]) / seconds,
    }


def _devices(
    place: Placement, memory: float | None, parts: Sequence[Plan], on: Mapping[str, int | None], extra: Mapping[str, int]
) -> list[dict[str, Any]]:
    """A row a device, and one for what finds no room: the largest pass that it holds."""
    every, found = [sizes(part, extra) for part in parts], []
    for name in dict.fromkeys(place.devices.values()):
        here = [layer for layer, device in on.items() if device == name]
        held = [tuple(sum(size.get(layer, 0) for layer in here) for size in both) for both in every]
        statistics, buffers = max(held, key=sum)
        lies = [part for part, device in place.devices.items() if device == name]
        row: dict[str, Any] = {"device": name, "first": lies[0], "last": lies[-1], "weights": place.weights(name)}
        row |= {"statistics": statistics, "buffers": buffers, "total": row["weights"] + statistics + buffers}
        found.append(row | {"fits": name is not None and (memory is None or row["total"] <= memory)})
    return found
