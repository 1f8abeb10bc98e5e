"""Covariance, correlations and eigenvalues of the units of a site, each computed once for all metrics that read the same sums."""

import torch
from torch import Tensor

from nodelens.statistics import Gram, Moments
from nodelens.statistics.base import derived, is_derived
from nodelens.statistics.linalg import constant, correlation, eigenvalues, principal_axes

EVEN = 4  # largest ratio of the rounding errors of units that counts as even


@derived
def constant_units(y: Gram | Moments) -> Tensor:
    """Which units are constant, (units,) bool."""
    return constant(y.covariance.diagonal() if isinstance(y, Gram) else y.variance, y.mean)


@derived
def correlation_of(y: Gram) -> Tensor:
    """Correlations from a Gram, (units, units): 0 for constant units, NaN below two rows."""
    rho = correlation(y.covariance, constant_units(y))
    return rho if int(y.n) > 1 else torch.full_like(rho, torch.nan)


@derived
def live_covariance(y: Gram) -> Tensor:
    """The covariance, (units, units), exactly 0 for constant units; NaN below two rows."""
    live = ~constant_units(y)
    if int(y.n) < 2:
        return torch.full_like(y.covariance, torch.nan)
    return y.covariance if bool(live.all()) else y.covariance.where(live[:, None] & live, 0)


def rounding_of(y: Gram, standardized: bool) -> Tensor:
    """The rounding error of the variances of the units, (units,), or of their correlations with themselves."""
    error = y.variance_rounding
    return error / y.covariance.diagonal().where(~constant_units(y), 1.0) if standardized else error


@derived
def eigenvalues_of(y: Gram, standardized: bool) -> Tensor:
    """Eigenvalues of the covariance, or of the correlations, (units,), largest first; 0 for those that rounding hides."""
    found, rounding = None, rounding_of(y, standardized)
    of_units = rounding[~constant_units(y)]
    # with no more rows than units some eigenvalues are hidden: only eigenvectors tell which, unless the rounding is even
    uneven = 0 < int(y.n) <= len(of_units) and bool(of_units.amax() > EVEN * of_units.amin())
    if not uneven and not is_derived(axes_of, y, standardized):
        found = eigenvalues(_matrix(y, standardized), rounding)
    return axes_of(y, standardized)[0] if found is None else found


@derived
def axes_of(y: Gram, standardized: bool) -> tuple[Tensor, Tensor]:
    """Those eigenvalues, and the eigenvectors as columns, (units, units)."""
    return principal_axes(_matrix(y, standardized), rounding_of(y, standardized))


def _matrix(y: Gram, standardized: bool) -> Tensor:
    return correlation_of(y) if standardized else live_covariance(y)
