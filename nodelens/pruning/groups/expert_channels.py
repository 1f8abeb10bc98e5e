"""PruningGroups of experts that share tensors, one a row in dimension 0: the hidden units of each."""

from torch import nn

from nodelens.network.architecture import UnclearError
from nodelens.network.experts import Experts
from nodelens.network.groups import GroupSlice, Patch, PruningGroup, identity, offsets, span

from .projections import plain

MULTIPLE = 8  # grouped matrix products want rows of 16 bytes: 8 numbers of two bytes
_WIDTHS = ("intermediate_dim", "intermediate_size", "expert_dim")


def experts_axes(path: str, module: nn.Module) -> list[PruningGroup]:
    """A group an expert, ``path[e]``, of a module that keeps all in ``gate_up_proj`` (or ``up_proj``) and ``down_proj``.

    Empty for any other module. Raises UnclearError where the tensors are not understood.
    """
    experts = Experts.of(module)
    if experts is None:
        return []
    made, n, turned = experts.up_name, experts.units, int(experts.transposed)
    if not plain(module._parameters[made]) or not plain(module._parameters["down_proj"]):
        raise UnclearError("the experts' weights are quantised, or made of other tensors")
    bias = f"{made}_bias" if module._parameters.get(f"{made}_bias") is not None else None
    each = identity(n)
    concatenated = getattr(module, "is_concatenated", True)
    rows = each if not experts.gated else offsets((each, n + each)) if concatenated else span(n, 2)
    patches = tuple(Patch(path, name, 1) for name in _WIDTHS if getattr(module, name, None) == n)
    return [
        PruningGroup(
            f"{path}[{e}]",
            "moe_ffn",
            n,
            (
                GroupSlice(path, made, 1 + turned, rows, "producer", entry=e),
                *([GroupSlice(path, bias, 1, rows, "producer", entry=e)] if bias else []),
                GroupSlice(path, "down_proj", 2 - turned, each, "consumer", entry=e),
            ),
            patches if e == 0 else (),  # of all experts at once: they keep the same number
            together=path,
            multiple=MULTIPLE,
        )
        for e in range(len(experts))
    ]
