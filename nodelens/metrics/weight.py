"""What can be said of a unit, or of a layer, without data. Nothing here has a standard error."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .base import Metric

NEAR = 1e-6  # of two rows' squares: a squared distance below it is rounding in the product form
CHUNK = 2**24  # distances held at once, 128 MB


@dataclass(frozen=True)
class WeightMagnitude(Metric):
    """Norm of a unit's weights; the bias is left out.

    Formula: ||w||_p, w the unit's weights
    Shapes: weight (units, d) -> (units,)
    Unit:   that of the weights, >= 0; d entries N(0, 1), p = 2: about sqrt(d)
    NaN:    never
    Source: Li et al. 2017, 1608.08710, section 3 (p = 1)
    """

    names: ClassVar = ("weight_magnitude", "magnitude")
    weighted: ClassVar = True
    p: Literal[1, 2] = 2

    def __call__(self, weight: Tensor) -> Tensor:
        return torch.linalg.vector_norm(weight.double(), ord=self.p, dim=1)


@dataclass(frozen=True)
class NormScale(Metric):
    """Size of the factor by which the norm behind the layer multiplies the unit.

    It says what the unit is worth where training has pushed these factors towards 0, and little where it has not.

    Formula: |gamma|, gamma the unit's weight in the norm that follows its layer
    Shapes: gamma (units,) -> (units,)
    Unit:   none, >= 0; 1 in a norm fresh from its constructor
    NaN:    never
    Raises: ValueError when no norm follows the layer
    Source: Liu et al. 2017, 1708.06519, section 3
    """

    names: ClassVar = ("bn_scale", "network_slimming")
    weighted: ClassVar = True
    parameter: ClassVar = "norm"

    def __call__(self, weight: Tensor) -> Tensor:
        return weight.double().flatten().abs()


@dataclass(frozen=True)
class GeometricMedian(Metric):
    """How far a unit's weights lie from those of all others: the least far is the one the others can replace.

    Formula: sum over j of ||w_i - w_j||, w_i the weights of unit i
    Shapes: weight (units, d) -> (units,)
    Unit:   that of the weights, >= 0; d entries N(0, 1): about (units - 1) sqrt(2 d). Equal units: 0; so has a unit alone
    NaN:    never
    Source: He et al. 2019, 1811.00250, eq. 6
    """

    names: ClassVar = ("geometric_median", "fpgm")
    weighted: ClassVar = True

    def __call__(self, weight: Tensor) -> Tensor:
        w = weight.double()
        w = w - w.mean(0)
        return torch.cat([_distances(part, w).sum(1) for part in w.split(max(1, CHUNK // len(w)))])


def _distances(part: Tensor, w: Tensor) -> Tensor:
    """Euclidean distances of rows, (m, d) and (n, d) -> (m, n): by a product, but of rows that almost repeat one by differences."""
    size = part.square().sum(1)[:, None] + w.square().sum(1)
    square = size - 2 * part @ w.T
    near = square <= NEAR * size
    distance = square.where(~near, 0).sqrt()  # what is near is the row itself, and more than that below
    repeats = near.sum(1) > 1
    distance[repeats] = torch.cdist(part[repeats], w, compute_mode="donot_use_mm_for_euclid_dist")
    return distance


@dataclass(frozen=True)
class WeightCosine(Metric):
    """How far a unit's weights point where the other units' do.

    A unit whose weights are all zero has no direction: it is NaN, and no other unit's partner (counted as ``zero``).

    Formula: mean over j != i of w_i.w_j / (||w_i|| ||w_j||), w_i the weights of unit i
    Shapes: weight (units, d) -> (units,)
    Unit:   none, in [-1, 1]; equal units 1, random directions about 0
    NaN:    the unit's weights are all zero, or no other unit's are not
    Source: definition
    """

    names: ClassVar = ("weight_cosine_similarity", "cosine_similarity")
    weighted: ClassVar = True
    nan: ClassVar = "the unit's weights are all zero, or it has no partner"

    def __call__(self, weight: Tensor) -> Tensor:
        w = weight.double()
        live = w.any(1)
        unit = w / torch.linalg.vector_norm(w, dim=1, keepdim=True)
        unit = unit.where(live[:, None], 0)
        partners = live.sum() - 1
        value = (unit @ unit.sum(0) - 1) / partners  # the sum holds the unit itself, once
        return value.where(live & (partners > 0), torch.nan)

    def counts(self, weight: Tensor) -> dict[str, int]:
        return {"zero": int((~weight.any(1)).sum())}


@dataclass(frozen=True)
class _OfTensor(Metric):
    """A number a weight tensor, and one a model; biases and norms (1-D) are no part of it."""

    kind: ClassVar = "layer"
    weighted: ClassVar = True
    parameter: ClassVar = "tensor"

    @classmethod
    def of_model(cls, values: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """The model's number from its layers' and their numbers of weights: their sum."""
        return torch.stack(list(values)).sum()


@dataclass(frozen=True)
class L1Norm(_OfTensor):
    """Sum of the sizes of a layer's weights; the model's is the sum of its layers'.

    Formula: sum |W|, over the entries of the weight W
    Shapes: weight of any shape -> ()
    Unit:   that of the weights, >= 0; m entries N(0, 1): 0.7979 m
    NaN:    never
    Source: Lange et al. 2022, Clustering units in neural networks: upstream vs downstream information, TMLR
    """

    names: ClassVar = ("l1_norm",)

    def __call__(self, weight: Tensor) -> Tensor:
        return weight.double().abs().sum()


@dataclass(frozen=True)
class L2Norm(_OfTensor):
    """Sum of the squares of a layer's weights, no root taken; the model's is the sum of its layers'.

    Formula: sum W^2, over the entries of the weight W
    Shapes: weight of any shape -> ()
    Unit:   that of the weights squared, >= 0; m entries N(0, 1): m
    NaN:    never
    Source: Lange et al. 2022, Clustering units in neural networks: upstream vs downstream information, TMLR
    """

    names: ClassVar = ("l2_norm",)

    def __call__(self, weight: Tensor) -> Tensor:
        return weight.double().square().sum()


@dataclass(frozen=True)
class NuclearNorm(_OfTensor):
    """Sum of the singular values of a layer's weight matrix; the model's is the sum over its matrices.

    Formula: sum over k of s_k, s_k the singular values of the weight
    Shapes: weight (units, d) -> ()
    Unit:   that of the weights, >= 0; d orthonormal rows: d
    NaN:    a weight that is no matrix, such as a convolution's
    Source: Lange et al. 2022, Clustering units in neural networks: upstream vs downstream information, TMLR
    """

    names: ClassVar = ("nuc_norm",)
    nan: ClassVar = "the weight is no matrix"

    def __call__(self, weight: Tensor) -> Tensor:
        if weight.ndim != 2:
            return weight.new_full((), torch.nan, dtype=torch.float64)
        return torch.linalg.svdvals(weight.double()).sum()

    @classmethod
    def of_model(cls, values: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """The sum over the layers that have one; NaN where none has."""
        every = torch.stack(list(values))
        return every.nansum() if bool((~every.isnan()).any()) else every.sum()


@dataclass(frozen=True)
class Sparsity(_OfTensor):
    """Share of a layer's weights that are almost zero; the model's is the share of all its weights.

    Formula: share of the entries of the weight W with |W| < eps
    Shapes: weight of any shape -> ()
    Unit:   none, in [0, 1]; N(0, 1) entries, eps = 1e-3: 0.0008. A pruning mask's share adds to it
    NaN:    never
    Raises: ValueError when eps is not above 0
    Source: Lange et al. 2022, Clustering units in neural networks: upstream vs downstream information, TMLR
    """

    names: ClassVar = ("sparsity",)
    eps: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eps > 0:
            raise ValueError(f"sparsity: eps is {self.eps}; a weight counts when it is smaller than eps: above 0")

    def __call__(self, weight: Tensor) -> Tensor:
        return (weight.abs() < self.eps).double().mean()

    @classmethod
    def of_model(cls, values: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """The mean over the layers, each as large as its number of weights."""
        every = torch.stack(list(values))
        share = torch.tensor(list(sizes), dtype=torch.float64, device=every.device)
        return every @ share / share.sum()


@dataclass(frozen=True)
class SpectralGap(Metric):
    """How far the first singular value of the layer's weights stands out from the second.

    Formula: (s_1 - s_2) / s_1, s the singular values of the weight, largest first; s_2 = 0 where there is one only
    Shapes: weight (units, d) -> ()
    Unit:   none, in [0, 1]; rank one 1, orthonormal rows 0
    NaN:    the weights are all zero
    Source: definition
    """

    names: ClassVar = ("spectral_gap",)
    kind: ClassVar = "layer"
    weighted: ClassVar = True
    nan: ClassVar = "the weights are all zero"

    def __call__(self, weight: Tensor) -> Tensor:
        s = torch.linalg.svdvals(weight.double())
        return 1 - s[1:2].sum() / s[0]


@dataclass(frozen=True)
class SpectralNormRatio(Metric):
    """Share of the weights' Frobenius norm that their largest singular value has.

    Formula: s_1 / ||W||_F, s_1 the largest singular value of the weight W
    Shapes: weight (units, d) -> ()
    Unit:   none, in [1/sqrt(rank), 1]; rank one 1, k orthonormal rows 1/sqrt(k)
    NaN:    the weights are all zero
    Source: definition; its square is one over the stable rank, Rudelson & Vershynin 2007, math/0503442, section 1
    """

    names: ClassVar = ("spectral_norm_ratio",)
    kind: ClassVar = "layer"
    weighted: ClassVar = True
    nan: ClassVar = "the weights are all zero"

    def __call__(self, weight: Tensor) -> Tensor:
        w = weight.double()
        return torch.linalg.matrix_norm(w, ord=2) / torch.linalg.matrix_norm(w)


METRICS: tuple[type[Metric], ...] = (
    WeightMagnitude,
    NormScale,
    GeometricMedian,
    WeightCosine,
    L1Norm,
    L2Norm,
    NuclearNorm,
    Sparsity,
    SpectralGap,
    SpectralNormRatio,
)
