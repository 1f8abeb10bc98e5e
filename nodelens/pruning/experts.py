"""Experts that share tensors, one a row in dimension 0: the hidden units of each."""

from torch import Tensor, nn

from .axis import Axis, Cut, Patch, identity, offsets, span
from .projections import UnclearError, plain

MULTIPLE = 8  # grouped matrix products want rows of 16 bytes: 8 numbers of two bytes
_WIDTHS = ("intermediate_dim", "intermediate_size", "expert_dim")


def experts_axes(path: str, module: nn.Module) -> list[Axis]:
    """An axis an expert, ``path[e]``, of a module that keeps all in ``gate_up_proj`` (or ``up_proj``) and ``down_proj``.

    Empty for any other module. Raises UnclearError where the tensors are not understood.
    """
    held = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
    made = "gate_up_proj" if "gate_up_proj" in held else "up_proj"
    if made not in held or "down_proj" not in held or not held[made].ndim == held["down_proj"].ndim == 3:
        return []
    up, down, bias = held[made], held["down_proj"], f"{made}_bias"
    if other := held.keys() - {made, bias, "down_proj", "down_proj_bias"}:
        raise UnclearError(f"holds {', '.join(sorted(other))} beside its experts' weights")
    if not plain(up) or not plain(down):
        raise UnclearError("the experts' weights are quantised, or made of other tensors")
    gated = bool(getattr(module, "has_gate", made == "gate_up_proj"))
    layouts = [t for t in (False, True) if getattr(module, "is_transposed", t) == t and _fits(up, down, 1 + gated, t)]
    if len(layouts) != 1:
        raise UnclearError(f"{made} {tuple(up.shape)} and down_proj {tuple(down.shape)} do not tell where the units lie")
    turned = int(layouts[0])
    n = down.shape[2 - turned]
    each = identity(n)
    rows = each if not gated else offsets((each, n + each)) if getattr(module, "is_concatenated", True) else span(n, 2)
    patches = tuple(Patch(path, name, 1) for name in _WIDTHS if getattr(module, name, None) == n)
    return [
        Axis(
            f"{path}[{e}]",
            "moe_ffn",
            n,
            (
                Cut(path, made, 1 + turned, rows, "producer", entry=e),
                *([Cut(path, bias, 1, rows, "producer", entry=e)] if bias in held else []),
                Cut(path, "down_proj", 2 - turned, each, "consumer", entry=e),
            ),
            patches if e == 0 else (),  # of all experts at once: they keep the same number
            together=path,
            multiple=MULTIPLE,
        )
        for e in range(len(up))
    ]


def _fits(up: Tensor, down: Tensor, blocks: int, turned: bool) -> bool:
    """Whether they are (E, blocks n, width) and (E, width, n) or, turned, (E, width, blocks n) and (E, n, width)."""
    if turned:
        up, down = up.mT, down.mT
    return tuple(up.shape) == (len(down), blocks * down.shape[2], down.shape[1])
