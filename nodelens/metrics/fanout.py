"""Where the influence of a unit on the layers that read it goes: spread, bottlenecks, and overlap with other units."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nodelens.network.group_layer import GroupLayer
from nodelens.network.sharded import full
from nodelens.statistics import Moments

from .base import Metric
from .need import Need

CHUNK = 2**24  # distances in memory at once


def input_sizes(module: nn.Module) -> Tensor:
    """Absolute weights by receiver and input, kernels summed, (receivers, inputs) float64 on the CPU; 0 across groups."""
    weight: Any = full(module.weight.detach()).double().abs().cpu()  # type: ignore[operator]
    if isinstance(module, nn.modules.conv._ConvNd):
        weight = torch.block_diag(*weight.flatten(2).sum(2).unflatten(0, (module.groups, -1)))
        return weight.T if module.transposed else weight  # a transposed convolution stores inputs first
    return weight.T if hasattr(module, "nf") else weight  # GPT-2 stores the transpose


def influence_of(group: GroupLayer, x: Sequence[Moments]) -> Tensor:
    """Influence of each unit on the outputs of all layers that read it, (receivers, units) float64.

    Formula: I_ji = sum over the kernel and the places of unit i of |W_jp| sd(x_p), x the input of the layer, sd with ddof 0
    """
    parts = []
    for member, moments in zip(group.readers, x, strict=True):
        module = group.module.get_submodule(member.piece.module)
        sizes = input_sizes(module) if member.piece.entry is None else member.piece.of(group.module).double().abs().cpu()
        n = moments.n.double()
        deviation = (moments.variance * (n - 1) / n).clamp_min(0).sqrt().cpu()
        parts.append((sizes * deviation)[:, member.places].sum(2))
    return torch.cat(parts)


@dataclass(frozen=True)
class _OfInfluence(Metric):
    """Shared by functions of the influence of units on the layers that read them."""

    weighted: ClassVar = True
    parameter: ClassVar = "group"
    reads_consumers: ClassVar = True
    nan: ClassVar = "a unit without influence, or no rows"

    def needs(self) -> dict[str, Need]:
        return {"x": Need(Moments, "consumed")}

    def __call__(self, weight: GroupLayer, x: Sequence[Moments]) -> Tensor:
        influence = influence_of(weight, x)
        total = influence.sum(0)
        return self.of(influence).where(total > 0, torch.nan)

    def of(self, influence: Tensor) -> Tensor:
        """The value from the influence, (receivers, units)."""
        raise TypeError(f"{type(self).__name__} has no formula")


def sent(influence: Tensor) -> Tensor:
    """Share of a unit's influence that goes to each receiver, (receivers, units); 0 for a unit without influence."""
    total = influence.sum(0)
    return influence / total.where(total > 0, 1)


def received(influence: Tensor) -> Tensor:
    """Share of a receiver's input that comes from each unit, (receivers, units); 0 for a receiver without input."""
    total = influence.sum(1, keepdim=True)
    return influence / total.where(total > 0, 1)


@dataclass(frozen=True)
class FanoutEntropy(_OfInfluence):
    """How evenly a unit's influence is spread over the outputs of the layers that read it.

    Formula: -sum_j p_j ln p_j, p_j the share of the unit's influence that goes to output j; influence as in ``influence_of``
    Shapes: x over rows of the consumers' inputs -> (units,)
    Unit:   nats, in [0, ln(outputs)]; one output: 0; all alike: ln(outputs)
    NaN:    a unit without influence, or no rows
    Source: definition; Shannon 1948
    """

    names: ClassVar = ("fanout_entropy",)

    def of(self, influence: Tensor) -> Tensor:
        return -torch.special.xlogy(p := sent(influence), p).sum(0)


@dataclass(frozen=True)
class FanoutEffective(FanoutEntropy):
    """The effective number of outputs that a unit's influence reaches.

    Formula: exp(fanout_entropy)
    Shapes: x over rows of the consumers' inputs -> (units,)
    Unit:   outputs, in [1, number of outputs]
    NaN:    a unit without influence, or no rows
    Source: definition; Hill 1973, Ecology 54:427 (order 1)
    """

    names: ClassVar = ("fanout_effective",)

    def of(self, influence: Tensor) -> Tensor:
        return super().of(influence).exp()


@dataclass(frozen=True)
class BottleneckOut(_OfInfluence):
    """Share of a unit's influence that its ``topk`` main outputs get.

    Formula: sum of the topk largest p_j, p_j the share of the unit's influence that goes to output j
    Shapes: x over rows of the consumers' inputs -> (units,)
    Unit:   none, in [topk/outputs, 1]
    NaN:    a unit without influence, or no rows
    Raises: ValueError when topk is below 1
    Source: definition
    """

    names: ClassVar = ("bottleneck_out_max",)
    presets: ClassVar = {"bottleneck_out_topk_mass": {"topk": 5}}
    limits: ClassVar = {"topk": (lambda k: k >= 1, "it is 1 or more")}
    topk: int = 1

    def of(self, influence: Tensor) -> Tensor:
        return _largest(self.shares(influence), self.topk)

    def shares(self, influence: Tensor) -> Tensor:
        """The shares of which the largest count, (receivers, units)."""
        return sent(influence)


@dataclass(frozen=True)
class BottleneckIn(BottleneckOut):
    """How much the outputs that depend most on a unit depend on it: sum of the ``topk`` largest shares of their input.

    Formula: sum of the topk largest r_j, r_j the share of the input of output j that comes from the unit
    Shapes: x over rows of the consumers' inputs -> (units,)
    Unit:   none, in [0, topk]; the only unit that an output reads: 1 or more
    NaN:    a unit without influence, or no rows
    Raises: ValueError when topk is below 1
    Source: definition
    """

    names: ClassVar = ("bottleneck_in_max",)
    presets: ClassVar = {"bottleneck_in_topk_mass": {"topk": 5}}

    def shares(self, influence: Tensor) -> Tensor:
        return received(influence)


@dataclass(frozen=True)
class OutputOverlap(_OfInfluence):
    """How far the ``topk`` most similar units send their influence to the same outputs: high for a unit that others can replace.

    Formula: mean over the topk largest of 1 - sum_j |p_ji - p_jk|/2, over units k != i, p_ji the share of the influence of unit i
             that goes to output j
    Shapes: x over rows of the consumers' inputs -> (units,)
    Unit:   none, in [0, 1]; the same distribution: 1; no output in common: 0
    NaN:    a unit without influence, no rows, or no other unit with influence
    Raises: ValueError when topk is below 1
    Source: definition
    """

    names: ClassVar = ("output_redundancy", "outred")
    nan: ClassVar = "a unit without influence, no rows, or no other unit with influence"
    higher_is_better: ClassVar = False
    limits: ClassVar = {"topk": (lambda k: k >= 1, "it is 1 or more")}
    topk: int = 8

    def of(self, influence: Tensor) -> Tensor:
        live = influence.sum(0) > 0
        p, found = sent(influence).T[live], influence.new_full((influence.shape[1],), torch.nan)
        others = len(p) - 1
        if others > 0:
            rows = p.split(max(1, CHUNK // len(p)))
            nearest = [torch.cdist(part, p, p=1).topk(min(self.topk, others) + 1, 1, largest=False).values for part in rows]
            found[live] = 1 - torch.cat(nearest)[:, 1:].mean(1) / 2  # the nearest is the unit itself
        return found


def _largest(shares: Tensor, k: int) -> Tensor:
    """Sum of the k largest of each column, (units,)."""
    return shares.topk(min(k, len(shares)), 0).values.sum(0)
