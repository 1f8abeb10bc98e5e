"""The cost estimate of a plan: bytes, operations, time and placement."""

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
    """The machine that a pass will run on.

    devices: number of devices that share one copy of the model; memory: bytes per device, None for no limit; ranks: number of
    processes, each with its own copy of the model and share of the data; hours: time limit of the pass
    """

    devices: int = 1
    memory: float | None = None
    ranks: int = 1
    hours: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and (value <= 0 or (name in ("devices", "ranks") and value != int(value))):
                raise ValueError(f"cost.{name} is {value}; it is a number above 0 (devices and ranks: a whole number)")


@dataclass(frozen=True)
class CostEstimate:
    """The cost of a pass. Bytes of sums are exact, bytes of buffers are an upper bound; a multiply-add is two operations.

    model:      class, dtype, parameters, bytes (with the model's buffers), blocks
    sites:      per layer: width, statistics (names), bytes of sums, bytes of buffers, device (None: no room)
    statistics: the rows of the plan
    bytes:      statistics, buffers (buffered rows), total; activations of the forward itself are not included
    forward:    flops per sample and per row, overhead (relative to forward, or to forward and backward with ``gradients``)
    rate:       rows to read (tokens; for images samples), hours; rows, samples and operations per second, over all ranks
    passes:     layers and bytes of each pass over the data, as few passes as fit into ``budget``; empty if one layer does not fit
    devices:    per device: blocks, bytes of weights, statistics and buffers (of the largest pass), whether they fit
    ranks:      number of processes, bytes and rows of each, bytes of the all-reduce
    refused:    reasons why the pass would not start with these settings; empty if it would start
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
        """The estimate as dictionaries, lists, numbers and strings."""
        return asdict(self)


def estimate_plan(
    net: nn.Module,
    plan: Plan,
    rows: int,
    per_sample: int,
    machine: Machine,
    budget: float | None = None,
    max_passes: int = 1,
    extra: Mapping[str, int] | None = None,
    refused: Sequence[str] = (),
) -> CostEstimate:
    """The cost estimate of a plan.

    rows: number of rows to read; per_sample: rows of each sample; extra: bytes buffered at a layer in addition to the plan
    """
    place = Placement.of(net, machine.devices, math.inf if machine.memory is None else machine.memory)
    parts, reasons = _passes(plan, budget, max_passes)
    sums, buffers = sizes(plan, extra or {})
    on = {layer.name: place.device_of(layer) for layer in plan.layers}
    forward = _forward(plan, per_sample)
    total = {"statistics": sum(sums.values()), "buffers": sum(buffers.values())}
    devices = _devices(place, machine.memory, parts or [plan], on, extra or {})
    return CostEstimate(
        model=_model(net),
        sites=_sites(plan, sums, buffers, on),
        statistics=plan.rows(),
        bytes=total | {"total": sum(total.values())},
        forward=forward,
        rate=_rate(forward, rows, machine.hours, max(1, len(parts))),
        passes=[{"layers": [layer.title for layer in part.measured], "bytes": part.total_bytes} for part in parts],
        devices=devices,
        ranks={
            "ranks": machine.ranks,
            "bytes": sum(d["weights"] + d["statistics"] + d["buffers"] for d in devices),
            "rows": math.ceil(rows / machine.ranks),
            "all_reduce_bytes": total["statistics"] if machine.ranks > 1 else 0,
        },
        budget=budget,
        refused=[*refused, *reasons],
    )


def sizes(plan: Plan, extra: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """({layer: bytes of sums}, {layer: bytes of buffered rows}); their total is the plan's ``total_bytes`` plus ``extra``.

    Vectors of derivatives, of which those of all layers are there at once, count at the widest layer.
    """
    sums, buffers = Counter[str](), Counter(extra)
    for row in plan.rows():
        sums[row["layer"]] += row["bytes"]
    for site in plan.sites():
        buffers[site.layer.name] += buffer_bytes(plan, site)
    for site in held(plan):
        buffers[site.layer.name] += held_bytes(plan, site)
    if plan.vector_bytes:
        buffers[max(plan.layers, key=lambda layer: plan.seen(layer, "output").nbytes).name] += plan.vector_bytes
    return dict(sums), dict(buffers)


def _passes(plan: Plan, budget: float | None, allowed: int) -> tuple[list[Plan], list[str]]:
    """The fewest passes that fit into the budget, and the reasons why they would be refused."""
    try:
        parts = divided(plan, budget, max(1, len(plan.layers)))
    except MemoryError as error:
        return [], [str(error)]
    if len(parts) <= allowed:
        return parts, []
    wanted = f"set budget.max_passes={len(parts)}, or a larger budget.memory"
    return parts, [f"budget.max_passes is {allowed}, but {len(parts)} passes are needed: {wanted}"]


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
            "layer": layer.title,
            "width": plan.seen(layer, "output").width,
            "statistics": [str(need) for need in plan.needs(layer)],
            "bytes": sums.get(layer.name, 0),
            "buffers": buffers.get(layer.name, 0),
            "device": on[layer.name],
        }
        for layer in plan.layers
    ]


def _forward(plan: Plan, tokens: int) -> dict[str, Any]:
    """Operations of the model, and the overhead of the statistics relative to them."""
    return {
        "flops_per_sample": plan.dry_run.flops,
        "flops_per_row": plan.dry_run.flops / tokens,
        "rows_per_sample": tokens,
        "row": "token" if plan.dry_run.tokens else "sample",
        "gradients": plan.gradients,
        "overhead": plan.overhead(),
    }


def _rate(forward: Mapping[str, Any], rows: int, hours: float, passes: int) -> dict[str, Any]:
    """The rate needed to finish in time. The model runs once per pass; each statistic is computed in one pass."""
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
    """One row per device, for its largest pass, and one row for parts that fit on no device."""
    every, found = [sizes(part, extra) for part in parts], []
    for name in dict.fromkeys(place.devices.values()):
        here = [layer for layer, device in on.items() if device == name]
        held = [tuple(sum(size.get(layer, 0) for layer in here) for size in both) for both in every]
        statistics, buffers = max(held, key=sum)
        held_parts = [part for part, device in place.devices.items() if device == name]
        row: dict[str, Any] = {"device": name, "first": held_parts[0], "last": held_parts[-1], "weights": place.weights(name)}
        row |= {"statistics": statistics, "buffers": buffers, "total": row["weights"] + statistics + buffers}
        found.append(row | {"fits": name is not None and (memory is None or row["total"] <= memory)})
    return found
