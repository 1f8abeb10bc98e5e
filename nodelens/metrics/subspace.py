"""Angles between the subspaces of the leading directions of two layers."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nodelens.statistics import Gram

from .covariances import axes_of, live_covariance
from .layer_pair import EdgeMetric
from .need import Need

CLOSE = 1.05  # ratio of the k-th to the next eigenvalue, below which the choice of the k-th axis is arbitrary


@dataclass(frozen=True)
class SubspaceMetric(EdgeMetric):
    """Base class of functions of the k = ``novelty_k`` leading principal axes of two layers in the same basis.

    k is at most the rank of either layer, because axes without variance are arbitrary (``cut_to_rank``). If eigenvalue k and
    the next are within 5 %, the choice of the last axis is arbitrary too (``close_eigenvalues`` counts such layers).
    """

    nan: ClassVar = "layers of different width, fewer than two rows, or a layer without variance"
    limits: ClassVar = {"novelty_k": (lambda k: k >= 1, "it takes 1 or more axes")}
    novelty_k: int = 32

    def needs(self) -> dict[str, Need]:
        return self.both(pair=None)

    def __call__(self, weight: Tensor | None, x: Gram, y: Gram) -> Tensor:
        if len(x.shift) != len(y.shift):
            return x.shift.new_full((), torch.nan)
        (lam_x, u_x), (lam_y, u_y) = axes_of(x, False), axes_of(y, False)
        k = self._k(self.cut(lam_x, lam_y))
        return self.between(u_x[:, :k], u_y[:, :k], live_covariance(y)) if k else x.shift.new_full((), torch.nan)

    def between(self, u_x: Tensor, u_y: Tensor, after: Tensor) -> Tensor:
        """The value from the axes of both layers, (d, k), and the covariance of the next layer, (d, d)."""
        raise TypeError(f"{type(self).__name__} has no formula")

    def cut(self, before: Tensor, after: Tensor) -> list[Tensor]:
        """The spectra that limit k."""
        return [before, after]

    def _k(self, spectra: list[Tensor]) -> int:
        return min(self.novelty_k, *(int((lam > 0).sum()) for lam in spectra))

    def counts(self, weight: Tensor | None, x: Gram, y: Gram) -> dict[str, int]:
        if len(x.shift) != len(y.shift):
            return {"unequal_widths": 1}
        spectra = self.cut(axes_of(x, False)[0], axes_of(y, False)[0])
        k = self._k(spectra)
        close = sum(bool(lam[k - 1] < CLOSE * lam[k]) for lam in spectra if 0 < k < len(lam))
        return {"close_eigenvalues": close, "cut_to_rank": int(k < self.novelty_k)}


def _sines(u_x: Tensor, u_y: Tensor) -> Tensor:
    """Sines of the principal angles, (k,), from the part of u_x orthogonal to u_y: accurate for small angles, unlike 1 - s^2."""
    return torch.linalg.svdvals(u_x - u_y @ (u_y.T @ u_x)).clamp_max(1)


@dataclass(frozen=True)
class SubspaceNovelty(SubspaceMetric):
    """How new the leading directions of the next layer are: mean sine of the principal angles between the two subspaces.

    Formula: mean_i sqrt(1 - s_i^2), s the singular values of U_x'U_y, U the k leading eigenvectors of the covariances
    Shapes: x, y over rows of the same width -> ()
    Unit:   none, in [0, 1]; equal subspaces: 0; orthogonal subspaces: 1
    NaN:    layers of different width, fewer than two rows, or a layer without variance
    Raises: ValueError when novelty_k is below 1
    Source: Bjorck & Golub 1973, Math. Comp. 27:579, theorem 1 (the angles between subspaces)
    """

    names: ClassVar = ("feature_subspace_novelty",)

    def between(self, u_x: Tensor, u_y: Tensor, after: Tensor) -> Tensor:
        return _sines(u_x, u_y).mean()


@dataclass(frozen=True)
class SubspaceOverlap(SubspaceMetric):
    """Share of the leading directions that two layers have in common: mean squared cosine of the principal angles.

    Random k-dimensional subspaces of d dimensions give k/d.

    Formula: ||U_x'U_y||_F^2/k, U the k leading eigenvectors of the covariances
    Shapes: x, y over rows of the same width -> ()
    Unit:   none, in [0, 1]; equal subspaces: 1; orthogonal subspaces: 0
    NaN:    layers of different width, fewer than two rows, or a layer without variance
    Raises: ValueError when novelty_k is below 1
    Source: Bjorck & Golub 1973, Math. Comp. 27:579, theorem 1 (the cosines of the angles)
    """

    names: ClassVar = ("subspace_overlap",)

    def between(self, u_x: Tensor, u_y: Tensor, after: Tensor) -> Tensor:
        return (u_x.T @ u_y).square().sum() / u_x.shape[1]


@dataclass(frozen=True)
class SubspaceChordal(SubspaceMetric):
    """Chordal distance between the subspaces of the leading directions of two layers.

    Formula: sqrt(sum_i (1 - s_i^2)), s the singular values of U_x'U_y, U the k leading eigenvectors of the covariances
    Shapes: x, y over rows of the same width -> ()
    Unit:   none, in [0, sqrt(k)]; equal subspaces: 0; orthogonal subspaces: sqrt(k)
    NaN:    layers of different width, fewer than two rows, or a layer without variance
    Raises: ValueError when novelty_k is below 1
    Source: Conway, Hardin & Sloane 1996, math/0208004, section 2
    """

    names: ClassVar = ("subspace_chordal",)

    def between(self, u_x: Tensor, u_y: Tensor, after: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(u_x - u_y @ (u_y.T @ u_x))


@dataclass(frozen=True)
class EnergyNovelty(SubspaceMetric):
    """Share of the next layer's variance outside the leading directions of this layer.

    Only the axes of this layer are used, so only its spectrum limits k and is checked for close eigenvalues.

    Formula: 1 - tr(U_x'C_y U_x)/tr C_y, U_x the k leading eigenvectors of this layer's covariance, C_y the next one's
    Shapes: x, y over rows of the same width -> ()
    Unit:   none, in [0, 1]; y = x of rank k or less: 0; orthogonal layers: 1
    NaN:    layers of different width, fewer than two rows, or a layer without variance
    Raises: ValueError when novelty_k is below 1
    Source: Jolliffe 2002, Principal Component Analysis, 2nd ed., section 2.1 (variance along axes)
    """

    names: ClassVar = ("energy_novelty",)

    def between(self, u_x: Tensor, u_y: Tensor, after: Tensor) -> Tensor:
        return 1 - ((after @ u_x) * u_x).sum() / after.trace()

    def cut(self, before: Tensor, after: Tensor) -> list[Tensor]:
        return [before]
