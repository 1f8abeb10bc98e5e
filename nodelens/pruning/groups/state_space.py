"""The channels of selective state spaces (Mamba), found by the attribute names of their modules."""

from torch import nn

from nodelens.network.architecture import UnclearError
from nodelens.network.groups import GroupSlice, PruningGroup, StoredCount, identity, offsets

from .projections import Projection, child, has, join

_NAMES = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")


def state_space_groups(path: str, module: nn.Module) -> list[PruningGroup]:
    """The channels of a Mamba block, as in Mamba, FalconMamba and Jamba; empty for any other module.

    A channel has a state of its own: it is read only by ``out_proj``, and by ``x_proj``, which computes time steps, B and C from
    all channels. Blocks with heads (Mamba 2) have no such group. Raises UnclearError if a matching block is not understood.
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
    per_channel = [(f"conv1d.{name}", part) for name, part in convolution.named_parameters()]  # type: ignore[union-attr]
    per_channel += [(f"dt_proj.{name}", part) for name, part in steps.module.named_parameters()]
    tied = [*(name for name, _ in per_channel), "A_log", "D"]
    slices = [GroupSlice(join(path, name.rpartition(".")[0]), name.rpartition(".")[2], 0, each, "tied") for name in tied]
    counts = (StoredCount(path, "intermediate_size", 1), StoredCount(join(path, "conv1d"), "groups", 1))
    return [PruningGroup(path, "channel", n, (*first.producers(both), *slices, reads.consumer(each), out.consumer(each)), counts)]
