"""One pass of a language model over tokens: what its sites show, a sample of it, and what its routers decide."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..collect import Pass
from ..distributed import first_of, reduce_sums, reduce_tensor
from ..frame import Frame
from ..hooks import Capture, Site, observed
from ..layers import Layer
from ..measure import device_of, run_pass
from ..metrics import Need
from ..plan import Plan
from ..recording import Recording
from ..roles import roles_of
from ..statistics import Accumulator
from ..wide import Wide
from .columns import Columns
from .router import Router, RouterLoad, Routers
from .sites import HookPoint, Shown, check_rows, merged, pairs, unique
from .tables import Values
from .tokens import TokenBatch, TokenSample, TokenStream


@dataclass(frozen=True)
class Reading:
    """What a pass found, of all processes together.

    points: as they were read, sites that show one tensor as one; loads: {router: load}; blocks: their names; left_out: rows that
    were not finite, by site
    """

    values: Values
    points: list[HookPoint]
    loads: dict[str, RouterLoad]
    blocks: list[str]
    tokens: int
    batches: int
    left_out: list[dict[str, Any]]


def read(
    net: nn.Module,
    stream: TokenStream,
    points: Sequence[HookPoint],
    columns: Columns,
    sample_limit: int | None,
    wide: Wide | None = None,
) -> Reading:
    """The pass. Collective.

    Raises ValueError without a token, without the routers that are asked for, and where a site does not show one row a token.
    """
    device, routers = device_of(net), Routers(net)
    found = first_of(_recorded(net, stream.head(), unique(points), routers if columns.router else None))
    if found is None:
        raise ValueError("the data hold no token that counts: nothing to measure")
    recording, named, same = found
    if columns.required and not named:
        raise ValueError(
            f"metrics names router, and no module of {type(net).__name__} is known as one: none puts out expert ids (tokens, k) "
            "with weights and scores; leave router out, or count ids of your own with nodelens.analysis.router.router_load"
        )
    routers.restore(named)
    points = merged(points, same)
    plan = Plan.of(net, unique(points), columns.summed, recording, groups=1, pairs=pairs(points), wide=wide)
    sample, widths = TokenSample(sample_limit or 1), {}
    if columns.sampled:
        widths = {layer.name: plan.seen(layer, "output").width for layer in plan.layers}
    taken = _pass(net, plan, stream, sample, list(widths), routers)
    counts = torch.tensor([stream.tokens, stream.batches, *(c.left_out for c in taken.collectors.values())], device=device)
    tokens, batches, *lost = reduce_tensor(counts).tolist()
    return Reading(
        values=Values(plan, _sums(taken, device), sample.gathered(widths, device), device),
        points=points,
        loads=routers.reduced(device),
        blocks=[block.name for block in roles_of(net).blocks],
        tokens=tokens,
        batches=batches,
        left_out=[{"site": str(site), "rows": n} for site, n in zip(taken.collectors, lost, strict=True) if n],
    )


def _recorded(
    net: nn.Module, head: TokenBatch | None, sites: Sequence[Layer], routers: Routers | None
) -> tuple[Recording, dict[str, Router], dict[str, str]] | None:
    """What one small forward shows: the sites' shapes, which modules route, and which sites show the tensor of another."""
    if head is None:
        return None
    looked = routers or Routers(net)
    looked.tokens = head.mask[:2].numel()
    shown = Shown()
    capture = Capture([Site(layer, "output") for layer in sites], shown.see)
    capture.gate = True
    with observed(net.modules() if routers else (), looked.look), capture:
        recording = Recording.of(net, sites, Frame.of(head.inputs).to(device_of(net)))
    check_rows(sites, recording, head.mask.shape[1])
    return recording, {router.name: router for router in looked.found.values()}, shown.same()


def _pass(net: nn.Module, plan: Plan, stream: TokenStream, sample: TokenSample, sampled: list[str], routers: Routers) -> Pass:
    """Every batch, shown to the plan's sums, of some layers to the sample, and to the routers."""
    capture = Capture([Site(layer, "output") for layer in plan.layers if layer.name in sampled], sample.see)
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
