"""The null model of correlations: what eigenvalues of a random correlation matrix leave (MacMahon & Garlaschelli 2015)."""

from collections.abc import Iterator

import numpy as np


def correlation_matrix(covariance: np.ndarray) -> np.ndarray:
    """Correlations of units that all vary, (units, units) float64, with a diagonal of ones. Raises ValueError for other units."""
    variances = covariance.diagonal()
    if (variances <= 0).any():
        raise ValueError(f"{int((variances <= 0).sum())} units have associations but no variance: this is no covariance matrix")
    return covariance / np.sqrt(np.outer(variances, variances))


def groups_matrix(correlations: np.ndarray, rows: int) -> np.ndarray:
    """The modularity matrix of correlations against random ones, (units, units): C_g divided by the sum of C.

    C_g is the part of C whose eigenvalues are above (1 + sqrt(units/rows))^2, the largest that independent units have (Marchenko &
    Pastur), without the common mode: the largest of them, if all units have the same sign in it and it is more than twice the next
    eigenvalue (among groups of equal size, the largest can have one sign by chance). It is zero, and all partitions have Q = 0,
    where no such eigenvalue is left. Source: MacMahon & Garlaschelli 2015, Phys. Rev. X 5:021006 (1311.1924).
    """
    values, vectors = np.linalg.eigh(correlations)
    chosen = values > (1 + np.sqrt(len(correlations) / rows)) ** 2
    largest = vectors[:, -1]
    one_sign = bool((largest > 0).all() or (largest < 0).all())
    chosen[-1] &= not (one_sign and values[-1] > 2 * values[-2])
    kept = vectors[:, chosen]
    return (kept * values[chosen]) @ kept.T / correlations.sum()


def random_correlations(units: int, rows: int, count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Draws correlation matrices of independent normal units, measured on as many rows, (units, units) each."""
    for _ in range(count):
        yield correlation_matrix(_wishart(units, rows - 1, rng))


def _wishart(units: int, free: int, rng: np.random.Generator) -> np.ndarray:
    """The scatter of independent normal rows; by the decomposition of Bartlett 1933 where there are more rows than units."""
    if free < units:
        rows = rng.standard_normal((free, units))
        return rows.T @ rows
    lower = np.tril(rng.standard_normal((units, units)), -1)
    lower[np.diag_indices(units)] = np.sqrt(rng.chisquare(free - np.arange(units)))
    return lower @ lower.T
