"""One pass of a language model over tokens: sums at its sites, a sample of rows, and the load of its routers."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nodelens.engine.analyze import run_pass
from nodelens.engine.collect import Pass
from nodelens.engine.covariance import CovariancePolicy
from nodelens.engine.driver import device_of
from nodelens.engine.dry_run import DryRun
from nodelens.engine.plan import Plan
from nodelens.engine.saved_work import Resumable, SavedWork, reading
from nodelens.engine.several_passes import check_again, divided
from nodelens.metrics import Need
from nodelens.network.batch import Batch
from nodelens.network.hooks import Capture, Site, observed
from nodelens.network.layers import Layer
from nodelens.network.objective import Objective
from nodelens.network.roles import roles_of
from nodelens.results.left_out import left_out_rows
from nodelens.statistics import Accumulator
from nodelens.statistics.processes import first_of, reduce_sums, reduce_tensor

from .columns import Columns
from .router import Router, RouterCounts, Routers
from .sites import HookPoint, SeenTensors, check_rows, merged, pairs, unique
from .tables import Values
from .tokens import TokenBatch, TokenReader, TokenSample


@dataclass(frozen=True)
class Reading:
    """What the passes found, over all processes.

    points: the hook points, with sites that show the same tensor merged; loads: {router: load}; blocks: their names;
    left_out: number of rows that were not finite, of how many, by site
    """

    values: Values
    points: list[HookPoint]
    loads: dict[str, RouterCounts]
    blocks: list[str]
    tokens: int
    batches: int
    left_out: list[dict[str, Any]]
    passes: list[dict[str, Any]]  # layers and bytes of each pass over the data


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
    saved: SavedWork | None = None,
) -> Reading:
    """Runs one pass, or as many as are needed to keep the sums within ``budget`` bytes; ``begin`` opens the tokens. Collective.

    saved: where the sums of an unfinished pass are kept.

    Raises ValueError if there are no tokens, if requested routers are not found, if a site does not show one row per token, or if
    several passes are needed but read different tokens or ``once`` (data that can be read once); MemoryError beyond ``max_passes``.
    """
    device, routers, stream = device_of(net), Routers(net), begin()
    found = first_of(_dry_run(net, stream.head(), unique(points), routers if columns.router else None))
    if found is None:
        raise ValueError("the data have no unmasked token: nothing to measure")
    dry_run, named, same = found
    if columns.required and not named:
        raise ValueError(
            f"metrics includes router, but no module of {type(net).__name__} is recognised as a router: none returns expert ids "
            "(tokens, k) with weights and scores. Remove router, or count expert ids with "
            "nodelens.analysis.geometry.router.router_load"
        )
    routers.restore(named)
    points = merged(points, same)
    plan = Plan.of(net, unique(points), columns.summed, dry_run, groups=1, pairs=pairs(points), covariance=covariance)
    parts = divided(plan, budget, max_passes)
    check_again(once, len(parts), device)
    opened = [(stream, routers), *((begin(), None) for _ in parts[1:])]
    every = [_read_once(net, part, *tokens, columns, sample_limit, saved) for part, tokens in zip(parts, opened, strict=True)]
    if len({one.seen for one in every}) > 1:
        seen = [one.seen for one in every]
        raise ValueError(f"the passes read different data, {seen} tokens and batches: the data must be the same every time")
    sums, rows, lost = (reduce(operator.or_, held) for held in zip(*(one[:3] for one in every), strict=True))
    return Reading(
        values=Values(plan, sums, rows, device),
        points=points,
        loads=routers.reduced(device),
        blocks=[block.name for block in roles_of(net).blocks],
        tokens=every[0].seen[0],
        batches=every[0].seen[1],
        left_out=left_out_rows(lost, *zip(*lost.values(), strict=True)) if lost else [],
        passes=[{"layers": [layer.name for layer in part.measured], "bytes": part.total_bytes} for part in parts],
    )


class _PassResult(NamedTuple):
    """Result of one pass over all processes: sums, sampled rows by layer, rows left out of all rows by site, (tokens, batches)."""

    sums: dict[tuple[str, Need], Accumulator]
    rows: dict[str, Tensor]
    lost: dict[str, tuple[int, int]]
    seen: tuple[int, int]


def _read_once(
    net: nn.Module,
    plan: Plan,
    stream: TokenReader,
    routers: Routers | None,
    columns: Columns,
    sample_limit: int | None,
    saved: SavedWork | None,
) -> _PassResult:
    """Runs one pass over the layers that the plan measures. Routers are measured in the first pass only."""
    device, sample = device_of(net), TokenSample(sample_limit or 1)
    widths = {layer.name: plan.seen(layer, "output").width for layer in plan.measured if columns.sampled}
    taken = _pass(net, plan, stream, sample, list(widths), routers or Routers(net), saved)
    each = [n for c in taken.collectors.values() for n in (c.left_out, int(c.rows_seen))]
    tokens, batches, *left = reduce_tensor(torch.tensor([stream.tokens, stream.batches, *each], device=device)).tolist()
    lost = {str(site): (n, of) for site, n, of in zip(taken.collectors, left[::2], left[1::2], strict=True) if n}
    return _PassResult(_sums(taken, device), sample.gathered(widths, device), lost, (tokens, batches))


def _dry_run(
    net: nn.Module, head: TokenBatch | None, sites: Sequence[Layer], routers: Routers | None
) -> tuple[DryRun, dict[str, Router], dict[str, str]] | None:
    """One small forward: the shapes at the sites, the modules that are routers, and sites that show the same tensor."""
    if head is None:
        return None
    finder = routers or Routers(net)
    finder.tokens = head.mask[:2].numel()
    seen = SeenTensors()
    capture = Capture([Site(layer, "output") for layer in sites], seen.see)
    capture.gate = True
    with observed(net.modules() if routers else (), finder.discover), capture:
        dry_run = DryRun.of(net, sites, Batch.of(head.inputs).to(device_of(net)))
    check_rows(sites, dry_run, head.mask.shape[1])
    return dry_run, {router.name: router for router in finder.found.values()}, seen.duplicates()


@dataclass
class _Unfinished:
    """What a pass that continues needs."""

    collected: Pass
    sample: TokenSample
    routers: Routers
    stream: TokenReader

    def state_dict(self) -> dict[str, Any]:
        parts: dict[str, Resumable] = {"sums": self.collected, "sample": self.sample, "routers": self.routers}
        counts = {"tokens": self.stream.tokens, "batches": self.stream.batches}
        return counts | {name: each.state_dict() for name, each in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.collected.load_state_dict(state["sums"])
        self.sample.load_state_dict(state["sample"])
        self.routers.load_state_dict(state["routers"])
        self.stream.tokens, self.stream.batches = state["tokens"], state["batches"]


def _pass(
    net: nn.Module,
    plan: Plan,
    stream: TokenReader,
    sample: TokenSample,
    sampled: list[str],
    routers: Routers,
    saved: SavedWork | None,
) -> Pass:
    """Runs every batch and adds it to the sums of the plan, to the sample of some layers, and to the routers."""
    capture = Capture([Site(layer, "output") for layer in plan.measured if layer.name in sampled], sample.see)
    capture.gate = True
    objective = Objective.of(net)
    collected = Pass(plan, objective)
    own = _Unfinished(collected, sample, routers, stream)
    with capture, observed(routers.found, routers.see), reading(saved, own, lambda batch: batch) as rest:
        batches = stream.iterate(sample.begin, routers.begin, rest=rest)
        return run_pass(net, plan, batches, objective, collected=collected)


def _sums(taken: Pass, device: torch.device) -> dict[tuple[str, Need], Accumulator]:
    """The sums over all processes, on the CPU. Collective."""
    sums = taken.sums()
    reduce_sums(sums, device)
    for accumulator in sums.values():
        accumulator.to(torch.device("cpu"))
    return sums
