"""The channels and heads of selective state spaces (Mamba, Mamba 2), found by the attribute names of their modules."""

from dataclasses import replace

from torch import Tensor, nn

from nodelens.network.architecture import UnclearError
from nodelens.network.groups import GroupSlice, PruningGroup, StoredCount, identity, offsets, span

from .projections import Projection, child, has, join

_NAMES = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")


def state_space_groups(path: str, module: nn.Module) -> list[PruningGroup]:
    """The channels of a Mamba block, as in Mamba, FalconMamba and Jamba; empty for any other module.

    A channel has a state of its own: it is read only by ``out_proj``, and by ``x_proj``, which computes time steps, B and C from
    all channels. Raises UnclearError if a matching block is not understood.
    Source: Gu & Dao 2023, arXiv:2312.00752, algorithm 2 (parameters with one entry per channel).
    """
    decay, skip = (module._parameters.get(name) for name in ("A_log", "D"))
    if not has(module, *_NAMES) or decay is None or skip is None:
        return []
    first, reads, steps, out = (Projection.of(path, module, name) for name in ("in_proj", "x_proj", "dt_proj", "out_proj"))
    convolution, n = child(module, "conv1d"), out.inputs
    each, both = identity(n), offsets((identity(n), n + identity(n)))  # the input of the convolution, and the gate
    widths = {"in_proj": first.outputs / 2, "x_proj": reads.inputs, "dt_proj": steps.outputs, "A_log": len(decay), "D": len(skip)}
    widths["conv1d"] = getattr(convolution, "groups", 0)
    if different := {name: width for name, width in widths.items() if width != n}:
        name, width = next(iter(different.items()))
        raise UnclearError(f"{name} has {width} channels, out_proj reads {n}")
    tied = [*(f"conv1d.{name}" for name, _ in convolution.named_parameters()), "A_log", "D"]  # type: ignore[union-attr]
    slices = [GroupSlice(join(path, name.rpartition(".")[0]), name.rpartition(".")[2], 0, each, "tied") for name in tied]
    slices += [replace(piece, role="tied") for piece in steps.producers(each)]
    counts = (StoredCount(path, "intermediate_size", 1), StoredCount(join(path, "conv1d"), "groups", 1))
    pieces = (*first.producers(both), *slices, *reads.consumers(each), *out.consumers(each))
    return [PruningGroup(path, "channel", n, pieces, counts)]


def state_space_heads(path: str, module: nn.Module) -> list[PruningGroup]:
    """The heads of a Mamba 2 block, as in Mamba 2, Zamba 2 and Bamba; empty for any other module.

    ``in_proj`` computes, in this order, gates and inputs of all heads, B and C of each group, and one time step per head. All
    groups of heads keep as many: a unit is one head of each. Not exact where a norm reduces over the heads' channels. Raises
    UnclearError if a matching block is not understood.
    Source: Dao & Gu 2024, arXiv:2405.21060, section 7 (parameters with one entry per head).
    """
    decay, step = (module._parameters.get(name) for name in ("A_log", "dt_bias"))
    if not has(module, "in_proj", "conv1d", "out_proj") or decay is None or step is None or has(module, "x_proj"):
        return []
    first, out = (Projection.of(path, module, name) for name in ("in_proj", "out_proj"))
    convolution, heads = child(module, "conv1d"), len(decay)
    groups, width = int(getattr(module, "n_groups", 0)), out.inputs // heads
    convolved = int(getattr(convolution, "groups", 0))
    if not groups or heads % groups or width * heads != out.inputs or first.outputs != out.inputs + convolved + heads:
        raise UnclearError(
            f"in_proj has {first.outputs} outputs: they are not those of {heads} heads and {groups} groups of Mamba 2"
        )

    def by_unit(places: Tensor) -> Tensor:
        """Of one row per head, those of the same place in every group side by side, one row per unit."""
        return places.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1)

    channels, own = by_unit(span(heads, width)), by_unit(identity(heads))
    rows = offsets((channels, out.inputs + channels, out.inputs + convolved + own))
    tied = [GroupSlice(join(path, "conv1d"), name, 0, channels, "tied") for name, _ in convolution.named_parameters()]  # type: ignore[union-attr]
    tied += [
        GroupSlice(path, name, 0, own, "tied") for name in ("A_log", "D", "dt_bias") if module._parameters.get(name) is not None
    ]
    norm = child(module, "norm")
    if norm is not None:
        tied.append(GroupSlice(join(path, "norm"), "weight", 0, channels, "tied"))
    sizes = {
        "num_heads": groups,
        "intermediate_size": groups * width,
        "conv_dim": groups * width,
        "ssm_intermediate_size": groups * width,
    }
    counts = [StoredCount(path, name, by) for name, by in sizes.items() if type(getattr(module, name, None)) is int]
    counts.append(StoredCount(join(path, "conv1d"), "groups", groups * width))
    if type(getattr(norm, "group_size", None)) is int:
        counts.append(StoredCount(join(path, "norm"), "group_size", width))
    pieces = (*first.producers(rows), *tied, *out.consumers(channels))
    return [PruningGroup(path, "head", heads // groups, pieces, tuple(counts), exact=norm is None)]
