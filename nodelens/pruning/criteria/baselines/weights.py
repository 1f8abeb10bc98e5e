"""Criteria of weights alone, and the one of chance."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from nodelens.metrics import get_metric
from nodelens.network.groups import PruningGroup
from nodelens.statistics.sample_hash import generator

from .base import Baseline, Found, added, matrices


@dataclass(frozen=True)
class Magnitude(Baseline):
    """Norm of the weights that make a unit; of several producers (gate and up; queries, keys, values) of all together.

    Formula: ||P(u)||_p, without biases
    Shapes: -> (units,)
    Unit:   that of the weights, >= 0
    NaN:    never
    Source: Li et al. 2017, 1608.08710, section 3 (p = 1)
    """

    names: ClassVar = ("magnitude", "l1")
    presets: ClassVar = {"l2": {"p": 2}}
    p: Literal[1, 2] = 1

    def __call__(self, group: PruningGroup, found: Found) -> Tensor:
        slices = matrices(found.model, group, "producer")
        return added(piece.by_unit(found.model).double().abs().pow(self.p).sum(1) for piece in slices) ** (1 / self.p)


@dataclass(frozen=True)
class GroupL2(Baseline):
    """Squared weights of a unit wherever it is made or read.

    No root is taken. Biases, norms and depthwise filters, which neither make nor read a unit, are left out.

    Formula: sum of w^2 over P(u) and K(u)
    Shapes: -> (units,)
    Unit:   that of the weights squared, >= 0
    NaN:    never
    Source: Fang et al. 2023, 2301.12900, section 3.3 (the norm of a group)
    """

    names: ClassVar = ("group_l2",)

    def __call__(self, group: PruningGroup, found: Found) -> Tensor:
        slices = matrices(found.model, group, "producer", "consumer")
        return added(piece.by_unit(found.model).double().square().sum(1) for piece in slices)


@dataclass(frozen=True)
class BatchNormScale(Baseline):
    """Size of the factor by which batch norms multiply a unit.

    It is the score of network slimming only after training that pushes these factors towards 0.

    Formula: sum of |gamma_u| over the batch norms tied to the group
    Shapes: -> (units,)
    Unit:   none, >= 0; 1 a norm fresh from its constructor
    NaN:    never
    Raises: ValueError where no batch norm with a weight is tied to the group
    Source: Liu et al. 2017, 1708.06519, section 3
    """

    names: ClassVar = ("bn_scale",)

    def __call__(self, group: PruningGroup, found: Found) -> Tensor:
        model = found.model
        norms = nn.modules.batchnorm._BatchNorm
        scales = [
            piece
            for piece in group.by_role("tied")
            if piece.tensor == "weight" and isinstance(model.get_submodule(piece.module), norms)
        ]
        if not scales:
            raise ValueError(
                f"bn_scale: no batch norm with a weight is tied to group {group.name!r}: choose another criterion, or leave it out"
            )
        return added(piece.by_unit(model).double().abs().sum(1) for piece in scales)


@dataclass(frozen=True)
class GeometricMedian(Baseline):
    """How far a unit's weights lie from those of all others: the least far is the one the others can replace.

    Formula: sum over v of ||P(u) - P(v)||_2, of raw signed weights; several producers side by side
    Shapes: -> (units,)
    Unit:   that of the weights, >= 0; 0 of equal units, and of a unit alone
    NaN:    never
    Source: He et al. 2019, 1811.00250, section 3.3
    """

    names: ClassVar = ("fpgm",)

    def __call__(self, group: PruningGroup, found: Found) -> Tensor:
        rows = [piece.by_unit(found.model).double() for piece in matrices(found.model, group, "producer")]
        return get_metric("fpgm")(torch.cat([part.to(rows[0].device) for part in rows], 1)).cpu()


@dataclass(frozen=True)
class Lamp(Baseline):
    """Share of a unit in the squares of all that are as large as it or larger: comparable over groups, the largest scores 1.

    Within a group it orders units as ``l2`` does.

    Formula: s_u^2 / sum over {v: s_v >= s_u} of s_v^2, s_u = ||P(u)||_2
    Shapes: -> (units,)
    Unit:   none, in [0, 1]
    NaN:    the group's weights are all zero
    Source: Lee et al. 2021, 2010.07611, section 3 (there of single weights; ties count for each other here)
    """

    names: ClassVar = ("lamp",)

    def __call__(self, group: PruningGroup, found: Found) -> Tensor:
        square = Magnitude(p=2)(group, found).square()
        ascending = square.sort().values
        above = ascending.flip(0).cumsum(0).flip(0)  # the sum of each and all behind it
        return square / above[torch.searchsorted(ascending, square)]


@dataclass(frozen=True)
class Random(Baseline):
    """Chance: the floor of every comparison. The global generator is left alone.

    Formula: U(0, 1), by a generator seeded with (seed, draw, the group's name)
    Shapes: -> (units,)
    Unit:   none, in [0, 1)
    NaN:    never
    Source: definition
    """

    names: ClassVar = ("random",)
    draw: int = 0

    def __call__(self, group: PruningGroup, found: Found) -> Tensor:
        return torch.rand(group.n, generator=generator(found.seed, str(self.draw), group.name), dtype=torch.float64)


BASELINES: tuple[type[Baseline], ...] = (Magnitude, GroupL2, BatchNormScale, GeometricMedian, Lamp, Random)
