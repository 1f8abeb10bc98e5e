"""Pruning groups of the hidden units of experts whose weights are stacked in shared tensors, one expert per row."""

from torch import Tensor, nn

from nodelens.network.architecture import UnclearError
from nodelens.network.experts import Experts
from nodelens.network.groups import GroupSlice, PruningGroup, StoredCount, identity, offsets, span

from .projections import child, join, plain

MULTIPLE = 8  # grouped matrix products need rows of 16 bytes: 8 numbers of two bytes
_WIDTHS = ("intermediate_dim", "intermediate_size", "expert_dim")


def expert_channel_groups(path: str, module: nn.Module) -> list[PruningGroup]:
    """One group per expert, ``path[e]``, of a module that stacks them in ``gate_up_proj`` (or ``up_proj``) and ``down_proj``.

    Or of a module with two modules for this, ``input_linear`` and ``output_linear`` (JetMoe). Empty for any other module. Raises
    UnclearError if the tensors are not understood.
    """
    experts = Experts.of(module)
    if experts is None:
        return _of_two_modules(path, module)
    name, n, transposed = experts.up_name, experts.units, int(experts.transposed)
    if not plain(module._parameters[name]) or not plain(module._parameters["down_proj"]):
        raise UnclearError("the experts' weights are quantized or computed from other tensors")
    bias = f"{name}_bias" if module._parameters.get(f"{name}_bias") is not None else None
    each = identity(n)
    concatenated = getattr(module, "is_concatenated", True)
    rows = each if not experts.gated else offsets((each, n + each)) if concatenated else span(n, 2)
    counts = tuple(StoredCount(path, width, 1) for width in _WIDTHS if getattr(module, width, None) == n)
    return [
        PruningGroup(
            f"{path}[{e}]",
            "moe_ffn",
            n,
            (
                GroupSlice(path, name, 1 + transposed, rows, "producer", entry=e),
                *([GroupSlice(path, bias, 1, rows, "producer", entry=e)] if bias else []),
                GroupSlice(path, "down_proj", 2 - transposed, each, "consumer", entry=e),
            ),
            counts if e == 0 else (),  # one count for all experts, which keep the same number
            equal_count=path,
            multiple=MULTIPLE,
        )
        for e in range(len(experts))
    ]


def _of_two_modules(path: str, module: nn.Module) -> list[PruningGroup]:
    """One group per expert of a mixture with gated units whose two modules hold the weights (E, 2 m, d) and (E, d, m)."""
    up, down = (getattr(child(module, name), "weight", None) for name in ("input_linear", "output_linear"))
    if not (isinstance(up, Tensor) and isinstance(down, Tensor)) or not up.ndim == down.ndim == 3:
        return []
    n, each = down.shape[2], identity(down.shape[2])
    if up.shape != (len(down), 2 * n, down.shape[1]):
        return []
    if not plain(up) or not plain(down):
        raise UnclearError("the experts' weights are quantized or computed from other tensors")
    first, second = join(path, "input_linear"), join(path, "output_linear")
    stored = {(path, "hidden_size"): (n, 1), (first, "output_size"): (2 * n, 2), (second, "input_size"): (n, 1)}
    held = {key: child(module, key[0].removeprefix(path).lstrip(".")) if key[0] != path else module for key in stored}
    counts = tuple(StoredCount(*key, by) for key, (size, by) in stored.items() if getattr(held[key], key[1], None) == size)
    return [
        PruningGroup(
            f"{path}[{e}]",
            "moe_ffn",
            n,
            (
                GroupSlice(first, "weight", 1, offsets((each, n + each)), "producer", entry=e),
                GroupSlice(second, "weight", 2, each, "consumer", entry=e),
            ),
            counts if e == 0 else (),
            equal_count=path,
            multiple=MULTIPLE,
        )
        for e in range(len(down))
    ]
