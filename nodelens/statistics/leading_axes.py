"""Eigenvalues of a covariance with only the leading eigenvectors, which take a third of the time of all of them."""

import torch
from scipy.linalg import eigh_tridiagonal, eigvalsh_tridiagonal, lapack
from torch import Tensor

from .linalg import SOLVER, one_blas_thread, principal_axes

_WIDE = 256  # narrower matrices take no longer with all eigenvectors
_FEW = 8  # at most one in so many eigenvectors is few


def leading_axes(covariance: Tensor, rounding: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first of the ``principal_axes``: all eigenvalues, (d,), and ``count`` eigenvectors as columns, at most d.

    Other eigenvectors are formed where they decide whether rounding hides their eigenvalue, and on a GPU.
    """
    width, variances = len(covariance), covariance.diagonal()
    few = width >= max(_WIDE, _FEW * count) and covariance.device.type == "cpu" and bool(covariance.isfinite().all())
    # else the rounding of some unit hides most directions that it is part of, and only all eigenvectors tell which
    even = few and bool(rounding.where(variances != 0, 0).amax() < variances.median())
    with one_blas_thread():
        found = _of_few(covariance, rounding, count) if even else None
    if found is None:
        values, axes = principal_axes(covariance, rounding)
        found = values, axes[:, :count]
    return found


def _of_few(covariance: Tensor, rounding: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """The same from few eigenvectors; None where too many are needed."""
    form = _Tridiagonal(covariance)
    values, varies = form.values, covariance.diagonal() != 0
    floor = SOLVER * values[0]
    first = int((values > torch.maximum(rounding.where(varies, 0).amax(), floor)).sum())  # those before it are resolved
    last = int((values > torch.maximum(rounding.where(varies, torch.inf).amin(), floor)).sum())  # those from it on are hidden
    if last - first > len(values) // _FEW:
        return None
    if first < count:
        top = form.axes(0, max(count, last))
        between = top[:, first:last]
    else:
        top, between = form.axes(0, count), form.axes(first, last)
    hidden = torch.arange(len(values)) >= last
    hidden[first:last] = values[first:last] <= torch.maximum(rounding @ between.square(), floor)
    values = values.where(~hidden, 0)
    order = values.argsort(descending=True, stable=True)
    return values[order], top[:, order[:count]]


class _Tridiagonal:
    """C = Q T Q', T tridiagonal and Q a product of reflections: T has the eigenvalues of C, and Q turns its eigenvectors.

    Golub & Van Loan 2013, Matrix Computations, section 8.3.1
    """

    def __init__(self, covariance: Tensor):
        c = covariance.numpy()
        size = int(lapack.dsytrd_lwork(len(c), lower=1)[0])
        self.reflections, self.diagonal, self.beside, self.tau, _ = lapack.dsytrd(c, lower=1, lwork=size)
        self.values = torch.from_numpy(eigvalsh_tridiagonal(self.diagonal, self.beside)[::-1].copy())  # (d,), largest first

    def axes(self, first: int, last: int) -> Tensor:
        """The eigenvectors of eigenvalues first..last-1 as columns, (d, last - first)."""
        width = len(self.diagonal)
        if first >= last:
            return torch.empty(width, 0, dtype=torch.float64)
        places = width - last, width - first - 1  # counted from the smallest
        found = eigh_tridiagonal(self.diagonal, self.beside, select="i", select_range=places)[1]
        below = self.reflections[1:, :-1]
        size = int(lapack.dormqr("L", "N", below, self.tau, found[1:], -1)[1][0])
        found[1:] = lapack.dormqr("L", "N", below, self.tau, found[1:], size)[0]
        return torch.from_numpy(found[:, ::-1].copy())
