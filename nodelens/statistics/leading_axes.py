"""Eigenvalues of a covariance with only the leading eigenvectors, which take a third of the time of all of them."""

import torch
from scipy.linalg import eigh_tridiagonal, eigvalsh_tridiagonal, lapack
from torch import Tensor

from .linalg import principal_axes, resolved_eigenvalues

_WIDE = 256  # narrower matrices take no longer with all eigenvectors
_FEW = 8  # at most one in so many eigenvectors is few


def leading_axes(covariance: Tensor, rounding: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues, (d,), as in ``spectrum``, and the first ``count`` eigenvectors as columns; all NaN if it is not finite.

    All eigenvectors are formed where they decide which eigenvalues rounding hides, and on a GPU.
    """
    width = len(covariance)
    if covariance.device.type == "cpu" and width >= max(_WIDE, _FEW * count) and bool(covariance.isfinite().all()):
        values, axes = _by_tridiagonal(covariance, count)
        found = resolved_eigenvalues(values, covariance.diagonal(), rounding)
        if found is not None:
            return found, axes
    values, axes = principal_axes(covariance, rounding)
    return values, axes[:, :count]


def _by_tridiagonal(covariance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues, (d,), largest first, and the first eigenvectors as columns, (d, count), from one tridiagonal form.

    C = Q T Q', Q a product of reflections: T gives the eigenvalues, and Q times its eigenvectors are those of C.
    Golub & Van Loan 2013, Matrix Computations, section 8.3.1
    """
    c, width = covariance.numpy(), len(covariance)
    size = int(lapack.dsytrd_lwork(width, lower=1)[0])
    reflections, diagonal, beside, tau, _ = lapack.dsytrd(c, lower=1, lwork=size)
    values = eigvalsh_tridiagonal(diagonal, beside)
    axes = eigh_tridiagonal(diagonal, beside, select="i", select_range=(width - count, width - 1))[1]
    size = int(lapack.dormqr("L", "N", reflections[1:, :-1], tau, axes[1:], -1)[1][0])
    axes[1:] = lapack.dormqr("L", "N", reflections[1:, :-1], tau, axes[1:], size)[0]
    return torch.from_numpy(values[::-1].copy()), torch.from_numpy(axes[:, ::-1].copy())
