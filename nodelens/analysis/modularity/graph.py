"""The graph of a layer's units: an association matrix made ready, its modularity, and what is said about a partition of it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

FEWEST = 3  # live units, below which a layer has no modules to speak of
NONE = -1  # the label of a unit in no module


@dataclass(frozen=True)
class Graph:
    """Units as nodes, associations as weights.

    weights: (live, live) float64, symmetric, zero diagonal
    live:    (units,) bool: the units that are nodes. The others are dead: no association with any other unit, or none defined
    """

    weights: np.ndarray
    live: np.ndarray

    @classmethod
    def of(cls, association: Any, absolute: bool = True, signed: bool = False, sparse: float | None = None) -> "Graph":
        """A graph from an association matrix, (units, units), array or tensor.

        The diagonal is set to zero. A row of NaN, as ``<association>_norm`` has for a unit without variance, makes the unit dead.

        absolute: weights are absolute values
        signed:   negative weights are allowed, for a null model of correlations
        sparse:   share of the nonzero pairs that keep an edge, of weight 1 (``sparsify``). None: all of them, with their weights

        Raises ValueError for a matrix that is not square, not symmetric, not finite or has negative entries, for fewer than three
        live units, and for one in which all associations are zero.
        """
        matrix = as_matrix(association)
        known = ~_undefined(matrix)
        inner = _among(matrix, known)
        _check_finite(inner, np.flatnonzero(known))
        inner = _symmetrized(inner)
        np.fill_diagonal(inner, 0)
        inner = np.abs(inner, out=inner) if absolute else inner
        if not signed and (inner < 0).any():
            share = f"{int((inner < 0).sum()) // 2:,} of {len(inner) * (len(inner) - 1) // 2:,}"
            raise ValueError(f"{share} associations are negative, and modularity is defined for weights >= 0: take absolute=True")
        inner = inner if sparse is None else sparsify(inner, sparse)
        linked = (inner != 0).any(1)
        live = known.copy()
        live[known] = linked
        check_live(int(live.sum()), len(matrix))
        return cls(_among(inner, linked), live)

    def labels(self, of_live: np.ndarray) -> np.ndarray:
        """Labels of live units as labels of all units, -1 for dead ones, (units,) int64."""
        every = np.full(len(self.live), NONE)
        every[self.live] = of_live
        return every


def as_matrix(association: Any) -> np.ndarray:
    """An association as a float64 matrix. Raises ValueError for one that is not square."""
    matrix = np.asarray(association.detach().cpu() if hasattr(association, "detach") else association, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"an association has the shape (units, units), this one {matrix.shape}")
    return matrix


def check_live(live: int, units: int) -> None:
    """Raises ValueError for fewer live units than modules can be found among."""
    if live == 0:
        raise ValueError(f"all associations of the {units} units are zero or undefined: there is no graph; leave the layer out")
    if live < FEWEST:
        words = "1 unit is" if live == 1 else f"{live} units are"
        raise ValueError(f"only {words} live of {units}, and modules need {FEWEST}: leave the layer out")


def _undefined(matrix: np.ndarray) -> np.ndarray:
    """The units whose associations with all other units are NaN, (units,) bool."""
    nan = np.isnan(matrix)
    np.fill_diagonal(nan, True)
    return nan.all(1) & nan.all(0) if len(matrix) > 1 else np.isnan(matrix.diagonal())


def _check_finite(matrix: np.ndarray, units: np.ndarray) -> None:
    off = ~np.isfinite(matrix)
    np.fill_diagonal(off, False)
    if off.any():
        i, j = np.argwhere(off)[0]
        raise ValueError(
            f"{int(off.any(1).sum())} units have associations that are NaN or infinite with some units and finite with others, "
            f"such as units {units[i]} and {units[j]}: measure more rows, or leave these units out"
        )


def _among(matrix: np.ndarray, units: np.ndarray) -> np.ndarray:
    """The entries of pairs of some units, (units,) bool; the matrix itself where these are all."""
    return matrix if units.all() else matrix[np.ix_(units, units)]


def _symmetrized(matrix: np.ndarray) -> np.ndarray:
    """The mean of a matrix and its transpose. Raises ValueError where they differ by more than rounding."""
    mean = matrix + matrix.T
    mean /= 2
    apart = matrix - mean  # half of the difference to the transpose
    np.fill_diagonal(apart, 0)
    most = 2 * np.abs(apart, out=apart).max(initial=0)
    np.copyto(apart, matrix)
    np.fill_diagonal(apart, 0)
    scale = np.abs(apart, out=apart).max(initial=0)
    if most > 1e-4 * scale:
        raise ValueError(
            f"the association is not symmetric: entries and their transposes differ by up to {most:.3g}, the largest entry "
            f"is {scale:.3g}: symmetrize it, as in (A + A.T) / 2"
        )
    return mean


def sparsify(association: Any, fraction: float) -> np.ndarray:
    """A binary graph: weight 1 for the pairs with the largest associations, 0 for the others, (units, units) float64.

    fraction: share of the pairs i < j with a nonzero association that keep an edge, rounded to the nearest number, at least one.
    Pairs that tie with the last one are kept, too. Source: Lange, Rolnick & Kording 2022, TMLR.

    Raises ValueError for a fraction that is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"sparsify is {fraction}; it is the share of pairs that keep an edge, above 0 and at most 1")
    matrix = as_matrix(association)
    pairs = matrix[np.triu_indices(len(matrix), 1)]
    pairs = np.sort(pairs[pairs != 0])[::-1]
    if not len(pairs):
        return np.zeros_like(matrix)
    least = pairs[max(1, round(fraction * len(pairs))) - 1]
    kept = ((matrix >= least) & (matrix != 0)).astype(np.float64)
    np.fill_diagonal(kept, 0)
    return kept


def modularity_matrix(weights: np.ndarray, gamma: float = 1.0) -> np.ndarray:
    """A/2m - gamma k k'/(2m)^2 with degrees k and total weight 2m, (units, units): Q is its sum over pairs in the same module."""
    degrees = weights.sum(1)
    total = degrees.sum()
    matrix = weights / total
    matrix -= np.outer(degrees * (gamma / total), degrees / total)
    return matrix


def quality(matrix: np.ndarray, labels: np.ndarray) -> float:
    """Sum of a modularity matrix over pairs of units in the same module; a unit of label -1 is in none."""
    inside = labels >= 0
    chosen = one_hot(labels[inside])
    return float(np.einsum("ic,ic->", _among(matrix, inside) @ chosen, chosen))


def one_hot(labels: np.ndarray) -> np.ndarray:
    """Labels 0..k-1 as indicators, (units, k) float64."""
    return np.eye(int(labels.max(initial=-1)) + 1)[labels]


def compact(labels: np.ndarray) -> np.ndarray:
    """Labels renumbered 0..k-1 in the order of their first unit; -1 stays, (units,) int64."""
    inside = labels >= 0
    _, first, found = np.unique(labels[inside], return_index=True, return_inverse=True)
    renamed = labels.copy()
    renamed[inside] = np.argsort(np.argsort(first))[found]
    return renamed


def modularity(association: Any, labels: Any, gamma: float = 1.0) -> float:
    """Newman's modularity of a partition: the weight inside modules, beyond what equal degrees at random would give.

    Q = sum over i, j in the same module of A_ij/2m - gamma k_i k_j/(2m)^2, with degrees k_i = sum_j A_ij and 2m = sum_i k_i.

    association: (units, units), symmetric, weights >= 0; the diagonal does not count
    labels:      (units,) integers; -1: in no module
    gamma:       resolution; above 1, more and smaller modules have the largest Q

    K equal cliques without links between them have 1 - 1/K, a single module 0 (gamma 1). NaN without an edge. Source: Newman 2006,
    PNAS 103:8577; gamma: Reichardt & Bornholdt 2006, Phys. Rev. E 74:016110.

    Raises ValueError for matrices that are no graph, and for another number of labels.
    """
    matrix, labels = as_matrix(association).copy(), as_labels(labels)
    if len(labels) != len(matrix):
        raise ValueError(f"there are {len(labels)} labels, and the association has {len(matrix)} units")
    dead = _undefined(matrix)
    matrix[dead], matrix[:, dead] = 0, 0
    _check_finite(matrix, np.arange(len(matrix)))
    _symmetrized(matrix)
    np.fill_diagonal(matrix, 0)
    if (matrix < 0).any():
        raise ValueError(
            f"{int((matrix < 0).sum()):,} entries are negative, and modularity is defined for weights >= 0: take abs()"
        )
    return quality(modularity_matrix(matrix, gamma), labels) if matrix.any() else float("nan")


def as_labels(labels: Any) -> np.ndarray:
    """Labels as integers, (units,), -1 for missing ones. Raises ValueError for another shape, and for fractions."""
    given = labels.detach().cpu() if hasattr(labels, "detach") else labels
    found = np.asarray(given, dtype=np.float64)
    if found.ndim != 1:
        raise ValueError(f"labels have the shape (units,), these {found.shape}")
    found = np.where(np.isnan(found), NONE, found)
    if (found != np.round(found)).any():
        raise ValueError(f"labels are integers, and {found[found != np.round(found)][0]:g} is none")
    return np.where(found < 0, NONE, found).astype(np.int64)


def connected_parts(weights: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
    """The connected component of each unit, (units,), numbered by their first unit; with labels, components inside modules."""
    found, open_units = np.full(len(weights), NONE), np.ones(len(weights), bool)
    for part in range(len(weights)):
        if not open_units.any():
            break
        first = int(open_units.argmax())
        reachable = open_units if labels is None else open_units & (labels == labels[first])
        fresh = np.array([first])
        while len(fresh):  # each unit's row is read once
            found[fresh], open_units[fresh] = part, False
            reachable = reachable & open_units
            fresh = np.flatnonzero((weights[fresh] != 0).any(0) & reachable)
    return found


def soft_num_clusters(labels: Any) -> float:
    """The effective number of modules: exp of the entropy of module sizes; units in no module do not count.

    Equal modules count as their number; sizes 8, 3 and 1 as 2.280. NaN without any. Source: Lange, Rolnick & Kording 2022, TMLR.
    """
    found = as_labels(labels)
    _, sizes = np.unique(found[found >= 0], return_counts=True)
    share = sizes / sizes.sum() if len(sizes) else np.array([])
    return float(np.exp(-(share * np.log(share)).sum())) if len(share) else float("nan")
