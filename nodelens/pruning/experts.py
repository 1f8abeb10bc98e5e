"""Axes of experts that share tensors, one a row in dimension 0: the hidden units of each."""

from torch import nn

from .. import anatomy
from ..experts import Experts
from .axis import Axis, Cut, Patch, identity, offsets, span
from .projections import UnclearError, plain

MULTIPLE = 8  # grouped matrix products want rows of 16 bytes: 8 numbers of two bytes
_WIDTHS = ("intermediate_dim", "intermediate_size", "expert_dim")


def experts_axes(path: str, module: nn.Module) -> list[Axis]:
    """An axis an expert, ``path[e]``, of a module that keeps all in ``gate_up_proj`` (or ``up_proj``) and ``down_proj``.

    Empty for any other module. Raises UnclearError where the tensors are not understood.
    """
    try:
        experts = Experts.of(module)
    except anatomy.UnclearError as reason:
        raise UnclearError(str(reason)) from None
    if experts is None:
        return []
    made, n, turned = experts.made, experts.units, int(experts.turned)
    if not plain(module._parameters[made]) or not plain(module._parameters["down_proj"]):
        raise UnclearError("the experts' weights are quantised, or made of other tensors")
    bias = f"{made}_bias" if module._parameters.get(f"{made}_bias") is not None else None
    each = identity(n)
    concatenated = getattr(module, "is_concatenated", True)
    rows = each if not experts.gated else offsets((each, n + each)) if concatenated else span(n, 2)
    patches = tuple(Patch(path, name, 1) for name in _WIDTHS if getattr(module, name, None) == n)
    return [
        Axis(
            f"{path}[{e}]",
            "moe_ffn",
            n,
            (
                Cut(path, made, 1 + turned, rows, "producer", entry=e),
                *([Cut(path, bias, 1, rows, "producer", entry=e)] if bias else []),
                Cut(path, "down_proj", 2 - turned, each, "consumer", entry=e),
            ),
            patches if e == 0 else (),  # of all experts at once: they keep the same number
            together=path,
            multiple=MULTIPLE,
        )
        for e in range(len(experts))
    ]
