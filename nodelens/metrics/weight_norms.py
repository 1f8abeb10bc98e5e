"""Norms of a layer's weights, and of those of all layers together: nothing here reads data or has a standard error."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Metric


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


METRICS: tuple[type[Metric], ...] = (L1Norm, L2Norm, NuclearNorm, Sparsity, SpectralGap, SpectralNormRatio)
