"""One pass of a language model over tokens: what its sites show, a sample of it, and what its routers decide."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nodelens.engine.analyze import device_of, run_pass
from nodelens.engine.collect import Pass
from nodelens.engine.covariance import CovariancePolicy
from nodelens.engine.dry_run import DryRun
from nodelens.engine.plan import Plan
from nodelens.engine.several_passes import check_again, divided
from nodelens.metrics import Need
from nodelens.network.batch import Batch
from nodelens.network.hooks import Capture, Site, observed
from nodelens.network.layers import Layer
from nodelens.network.roles import roles_of
from nodelens.statistics import Accumulator
from nodelens.statistics.processes import first_of, reduce_sums, reduce_tensor

from .columns import Columns
from .router import Router, RouterCounts, Routers
from .sites import HookPoint, Shown, check_rows, merged, pairs, unique
from .tables import Values
from .tokens import TokenBatch, TokenReader, TokenSample


@dataclass(frozen=True)
class Reading:
    """What a pass found, of all processes together.

    points: as they were read, sites that show one tensor as one; loads: {router: load}; blocks: their names; left_out: rows that
    were not finite, by site
    """

    values: Values
    points: list[HookPoint]
    loads: dict[str, RouterCounts]
    blocks: list[str]
    tokens: int
    batches: int
    left_out: list[dict[str, Any]]
    passes: list[dict[str, Any]]  # over the data: layers and bytes of each


def read(
    net: nn.Module,
    begin: Callable[[], TokenReader],
    points: Sequence[HookPoint],
    columns: Columns,
    sample_limit: int | None,
    covariance: CovariancePolicy | None = None,
    budget: float | None = None,
    max_passes: int = 1,
    once: bool = False,
) -> Reading:
    """The pass, or as many as it takes to hold the sums in ``budget`` bytes; ``begin`` opens the tokens for each. Collective.

    Raises ValueError without a token, without the routers that are asked for, where a site does not show one row a token, and where
    several passes do not see the same tokens or ``once`` says that there can be one; MemoryError beyond ``passes``.
    """
    device, routers, stream = device_of(net), Routers(net), begin()
    found = first_of(_recorded(net, stream.head(), unique(points), routers if columns.router else None))
    if found is None:
        raise ValueError("the data hold no token that counts: nothing to measure")
    dry_run, named, same = found
    if columns.required and not named:
        raise ValueError(
            f"metrics names router, and no module of {type(net).__name__} is known as one: none puts out expert ids (tokens, k) "
            "with weights and scores; leave router out, or count ids of your own with nodelens.analysis.geometry.router.router_load"
        )
    routers.restore(named)
    points = merged(points, same)
    plan = Plan.of(net, unique(points), columns.summed, dry_run, groups=1, pairs=pairs(points), covariance=covariance)
    parts = divided(plan, budget, max_passes)
    check_again(once, len(parts), device)
    opened = [(stream, routers), *((begin(), None) for _ in parts[1:])]
    every = [_read(net, part, *tokens, columns, sample_limit) for part, tokens in zip(parts, opened, strict=True)]
    if len({one.seen for one in every}) > 1:
        seen = [one.seen for one in every]
        raise ValueError(f"the passes saw {seen} tokens and batches: the data must be the same every time, or fit into one pass")
    sums, rows, lost = (reduce(operator.or_, held) for held in zip(*(one[:3] for one in every), strict=True))
    return Reading(
        values=Values(plan, sums, rows, device),
        points=points,
        loads=routers.reduced(device),
        blocks=[block.name for block in roles_of(net).blocks],
        tokens=every[0].seen[0],
        batches=every[0].seen[1],
        left_out=[{"site": site, "rows": n} for site, n in lost.items()],
        passes=[{"layers": [layer.name for layer in part.measured], "bytes": part.total_bytes} for part in parts],
    )


class _Read(NamedTuple):
    """What one pass found, of all processes: sums, the sample's rows by layer, rows not finite by site; tokens and batches."""

    sums: dict[tuple[str, Need], Accumulator]
    rows: dict[str, Tensor]
    lost: dict[str, int]
    seen: tuple[int, int]


def _read(
    net: nn.Module, plan: Plan, stream: TokenReader, routers: Routers | None, columns: Columns, sample_limit: int | None
) -> _Read:
    """One pass, over the layers that the plan measures; routers are those of the first."""
    device, sample = device_of(net), TokenSample(sample_limit or 1)
    widths = {layer.name: plan.seen(layer, "output").width for layer in plan.measured if columns.sampled}
    taken = _pass(net, plan, stream, sample, list(widths), routers or Routers(net))
    counts = torch.tensor([stream.tokens, stream.batches, *(c.left_out for c in taken.collectors.values())], device=device)
    tokens, batches, *left = reduce_tensor(counts).tolist()
    lost = {str(site): n for site, n in zip(taken.collectors, left, strict=True) if n}
    return _Read(_sums(taken, device), sample.gathered(widths, device), lost, (tokens, batches))


def _recorded(
    net: nn.Module, head: TokenBatch | None, sites: Sequence[Layer], routers: Routers | None
) -> tuple[DryRun, dict[str, Router], dict[str, str]] | None:
    """What one small forward shows: the sites' shapes, which modules route, and which sites show the tensor of another."""
    if head is None:
        return None
    looked = routers or Routers(net)
    looked.tokens = head.mask[:2].numel()
    shown = Shown()
    capture = Capture([Site(layer, "output") for layer in sites], shown.see)
    capture.gate = True
    with observed(net.modules() if routers else (), looked.look), capture:
        dry_run = DryRun.of(net, sites, Batch.of(head.inputs).to(device_of(net)))
    check_rows(sites, dry_run, head.mask.shape[1])
    return dry_run, {router.name: router for router in looked.found.values()}, shown.same()


def _pass(net: nn.Module, plan: Plan, stream: TokenReader, sample: TokenSample, sampled: list[str], routers: Routers) -> Pass:
    """Every batch, shown to the plan's sums, of some layers to the sample, and to the routers."""
    capture = Capture([Site(layer, "output") for layer in plan.measured if layer.name in sampled], sample.see)
    capture.gate = True
    with capture, observed(routers.found, routers.see):
        return run_pass(net, plan, stream.shown(sample.begin, routers.begin))


def _sums(taken: Pass, device: torch.device) -> dict[tuple[str, Need], Accumulator]:
    """Complete sums, on the CPU. Collective."""
    sums = taken.sums()
    reduce_sums(sums, device)
    for accumulator in sums.values():
        accumulator.to(torch.device("cpu"))
    return sums
