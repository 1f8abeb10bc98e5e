"""Norms of the weights of a layer and of the whole model: they read no data and have no standard error."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Metric
from .weight_values import leading_singular_values


@dataclass(frozen=True)
class _OfTensor(Metric):
    """One value per weight tensor and one per model; biases and norms (1-D tensors) are left out."""

    kind: ClassVar = "layer"
    weighted: ClassVar = True
    parameter: ClassVar = "tensor"

    @classmethod
    def of_model(cls, values: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """The value of the model from the values and sizes of its layers: their sum."""
        return torch.stack(list(values)).sum()


@dataclass(frozen=True)
class L1Norm(_OfTensor):
    """Sum of the absolute weights of a layer; the value of a model is the sum over its layers.

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
    """Sum of the squared weights of a layer, without a root; the value of a model is the sum over its layers.

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
    """Sum of the singular values of a layer's weight matrix; the value of a model is the sum over its matrices.

    Formula: sum over k of s_k, s_k the singular values of the weight
    Shapes: weight (units, d) -> ()
    Unit:   that of the weights, >= 0; d orthonormal rows: d
    NaN:    a weight that is not a matrix, such as that of a convolution
    Source: Lange et al. 2022, Clustering units in neural networks: upstream vs downstream information, TMLR
    """

    names: ClassVar = ("nuc_norm",)
    nan: ClassVar = "the weight is not a matrix"

    def __call__(self, weight: Tensor) -> Tensor:
        if weight.ndim != 2:
            return weight.new_full((), torch.nan, dtype=torch.float64)
        return torch.linalg.svdvals(weight.double()).sum()

    @classmethod
    def of_model(cls, values: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """The sum over layers that have a value; NaN where none has."""
        every = torch.stack(list(values))
        return every.nansum() if bool((~every.isnan()).any()) else every.sum()


@dataclass(frozen=True)
class Sparsity(_OfTensor):
    """Share of a layer's weights that are almost zero; the value of a model is the share over all its weights.

    Formula: share of the entries of the weight W with |W| < eps
    Shapes: weight of any shape -> ()
    Unit:   none, in [0, 1]; N(0, 1) entries, eps = 1e-3: 0.0008; weights masked by pruning count as zero
    NaN:    never
    Raises: ValueError when eps is not above 0
    Source: Lange et al. 2022, Clustering units in neural networks: upstream vs downstream information, TMLR
    """

    names: ClassVar = ("sparsity",)
    limits: ClassVar = {"eps": (lambda eps: eps > 0, "it must be above 0, as weights with |W| < eps count")}
    eps: float = 1e-3

    def __call__(self, weight: Tensor) -> Tensor:
        return (weight.abs() < self.eps).double().mean()

    @classmethod
    def of_model(cls, values: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """The mean over layers, weighted by their number of weights."""
        every = torch.stack(list(values))
        share = torch.tensor(list(sizes), dtype=torch.float64, device=every.device)
        return every @ share / share.sum()


@dataclass(frozen=True)
class SpectralGap(Metric):
    """Relative gap between the first and second singular value of a layer's weights.

    Formula: (s_1 - s_2) / s_1, s the singular values of the weight, largest first; s_2 = 0 where there is only one
    Shapes: weight (units, d) -> ()
    Unit:   none, in [0, 1]; rank one: 1; orthonormal rows: 0
    NaN:    the weights are all zero, or one is not finite
    Source: definition
    """

    names: ClassVar = ("spectral_gap",)
    kind: ClassVar = "layer"
    weighted: ClassVar = True

    def __call__(self, weight: Tensor) -> Tensor:
        first, second = leading_singular_values(weight)
        return 1 - second / first


@dataclass(frozen=True)
class SpectralNormRatio(Metric):
    """Largest singular value of a layer's weights relative to their Frobenius norm: 1 for a matrix of rank one.

    Formula: s_1 / ||W||_F, s_1 the largest singular value of the weight W
    Shapes: weight (units, d) -> ()
    Unit:   none, in [1/sqrt(rank), 1]; rank one: 1; k orthonormal rows: 1/sqrt(k)
    NaN:    the weights are all zero, or one is not finite
    Source: definition; its square is one over the stable rank, Rudelson & Vershynin 2007, math/0503442, section 1
    """

    names: ClassVar = ("spectral_norm_ratio",)
    kind: ClassVar = "layer"
    weighted: ClassVar = True

    def __call__(self, weight: Tensor) -> Tensor:
        return leading_singular_values(weight)[0] / torch.linalg.matrix_norm(weight.double())
