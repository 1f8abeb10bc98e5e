"""Metrics of a unit that need no data, such as weight norms: they have no standard error."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nodelens.network.group_layer import GroupLayer
from nodelens.statistics.sample_hash import generator

from .base import Metric
from .need import Units

NEAR = 1e-6  # relative to squared norms: a smaller squared distance is rounding error of the product form
CHUNK = 2**24  # distances in memory at once, 128 MB


@dataclass(frozen=True)
class Magnitude(Metric):
    """Norm of the weights that produce a unit: a cheap baseline.

    Several producers (gate and up; queries, keys, values) count together. Biases are left out. ``l2`` and ``weight_magnitude`` are
    the Euclidean norm.

    Formula: ||w||_p, w the unit's weights
    Shapes: weight (units, d) -> (units,)
    Unit:   that of the weights, >= 0; d entries N(0, 1): 0.7979 d for p = 1, about sqrt(d) for p = 2
    NaN:    never
    Source: Li et al. 2017, 1608.08710, section 3 (p = 1)
    """

    names: ClassVar = ("magnitude", "l1")
    presets: ClassVar = {"l2": {"p": 2}, "weight_magnitude": {"p": 2}}
    weighted: ClassVar = True
    p: Literal[1, 2] = 1

    def __call__(self, weight: Tensor) -> Tensor:
        return torch.linalg.vector_norm(weight.double(), self.p, 1)


@dataclass(frozen=True)
class GroupL2(Metric):
    """Sum of the squared weights that produce or consume a unit; biases, norms and depthwise filters are left out.

    Formula: sum of w^2 over the weights that produce or consume the unit, without a root
    Shapes: -> (units,)
    Unit:   that of the weights squared, >= 0
    NaN:    never
    Source: Fang et al. 2023, 2301.12900, section 3.3 (the norm of a group)
    """

    names: ClassVar = ("group_l2",)
    weighted: ClassVar = True
    parameter: ClassVar = "group"

    def __call__(self, weight: GroupLayer) -> Tensor:
        slices = weight.pieces("producer", "consumer")
        return torch.stack([piece.by_unit(weight.module).double().square().sum(1).cpu() for piece in slices]).sum(0)


@dataclass(frozen=True)
class NormScale(Metric):
    """Absolute scale factor of the batch norms after a unit.

    Use it for networks trained with a sparsity penalty on these factors; without one it is less informative.

    Formula: sum of |gamma_u| over the batch norms that follow the layer, or are tied to the pruning group
    Shapes: gamma (units, norms) -> (units,)
    Unit:   none, >= 0; 1 per norm at initialization
    NaN:    never
    Raises: ValueError when no norm follows the layer
    Source: Liu et al. 2017, 1708.06519, section 3
    """

    names: ClassVar = ("bn_scale", "network_slimming")
    weighted: ClassVar = True
    parameter: ClassVar = "norm"

    def __call__(self, weight: Tensor) -> Tensor:
        return weight.double().reshape(len(weight), -1).abs().sum(1)

    def check_group(self, name: str, group: GroupLayer) -> None:
        if group.norm is None:
            raise ValueError(
                f"{name}: no batch norm with a weight is tied to group {group.title!r}: choose another criterion, or leave it out"
            )


@dataclass(frozen=True)
class GeometricMedian(Metric):
    """Sum of the distances of a unit's weights to those of all other units: small for a unit that others can replace.

    Formula: sum over j of ||w_i - w_j||, w_i the weights of unit i, raw and signed
    Shapes: weight (units, d) -> (units,)
    Unit:   that of the weights, >= 0; d entries N(0, 1): about (units - 1) sqrt(2 d). Equal units: 0; a single unit: 0
    NaN:    never
    Source: He et al. 2019, 1811.00250, section 3.3, eq. 6
    """

    names: ClassVar = ("fpgm", "geometric_median")
    weighted: ClassVar = True

    def __call__(self, weight: Tensor) -> Tensor:
        w = weight.double()
        w = w - w.mean(0)
        return torch.cat([_distances(part, w).sum(1) for part in w.split(max(1, CHUNK // len(w)))])


@dataclass(frozen=True)
class Lamp(Metric):
    """Squared norm of a unit relative to the units with at least its norm: comparable between layers; the largest unit has 1.

    Within a layer it ranks units like ``l2``.

    Formula: s_u^2 / sum over {v: s_v >= s_u} of s_v^2, s_u = ||w_u||_2
    Shapes: weight (units, d) -> (units,)
    Unit:   none, in [0, 1]
    NaN:    the weights are all zero
    Source: Lee et al. 2021, 2010.07611, section 3 (there for single weights; here equal units count in each other's sums)
    """

    names: ClassVar = ("lamp",)
    weighted: ClassVar = True

    def __call__(self, weight: Tensor) -> Tensor:
        square = Magnitude(p=2)(weight).square()
        ascending = square.sort().values
        above = ascending.flip(0).cumsum(0).flip(0)  # the sum of each value and all larger ones
        return square / above[torch.searchsorted(ascending, square)]


@dataclass(frozen=True)
class Random(Metric):
    """Random scores: the baseline of every comparison. The global random generator is not used.

    Formula: U(0, 1), from a generator seeded with (seed, draw unless it is 0, name of the layer or group)
    Shapes: -> (units,)
    Unit:   none, in [0, 1)
    NaN:    never
    Source: definition
    """

    names: ClassVar = ("random",)
    weighted: ClassVar = True
    parameter: ClassVar = "units"
    draw: int = 0

    def __call__(self, weight: Units) -> Tensor:
        words = (str(self.draw),) if self.draw else ()
        chance = generator(weight.seed, *words, weight.layer)
        return torch.rand(weight.units, generator=chance, dtype=torch.float64)


def _distances(part: Tensor, w: Tensor) -> Tensor:
    """Euclidean distances of rows, (m, d) and (n, d) -> (m, n), by a product, or by differences for nearly equal rows."""
    size = part.square().sum(1)[:, None] + w.square().sum(1)
    square = size - 2 * part @ w.T
    near = square <= NEAR * size
    distance = square.where(~near, 0).sqrt()  # near are the row itself and, treated below, nearly equal rows
    repeats = near.sum(1) > 1
    distance[repeats] = torch.cdist(part[repeats], w, compute_mode="donot_use_mm_for_euclid_dist")
    return distance


@dataclass(frozen=True)
class WeightCosine(Metric):
    """Mean cosine similarity of a unit's weights with those of the other units: high for duplicated weights.

    For a unit whose weights are all zero, the value is NaN; the other units leave it out, and ``zero`` counts it.

    Formula: mean over j != i of w_i.w_j / (||w_i|| ||w_j||), w_i the weights of unit i
    Shapes: weight (units, d) -> (units,)
    Unit:   none, in [-1, 1]; equal units: 1; random directions: about 0
    NaN:    the unit's weights are all zero, or those of all other units are
    Source: definition
    """

    names: ClassVar = ("weight_cosine_similarity",)
    weighted: ClassVar = True
    nan: ClassVar = "the unit's weights are all zero, or it has no partner"
    higher_is_better: ClassVar = False

    def __call__(self, weight: Tensor) -> Tensor:
        w = weight.double()
        live = w.any(1)
        unit = w / torch.linalg.vector_norm(w, dim=1, keepdim=True)
        unit = unit.where(live[:, None], 0)
        partners = live.sum() - 1
        value = (unit @ unit.sum(0) - 1) / partners  # the sum includes the unit itself once
        return value.where(live & (partners > 0), torch.nan)

    def counts(self, weight: Tensor) -> dict[str, int]:
        return {"zero": int((~weight.any(1)).sum())}
