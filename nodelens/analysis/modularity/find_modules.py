"""Modules of one association: the partition of its units with the largest modularity that a method finds."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from nodelens.messages import as_seed

from .graph import NONE, Graph, compact, connected_parts, modularity_matrix, quality, soft_num_clusters
from .leiden import leiden_labels
from .louvain import louvain_matrix
from .monte_carlo import monte_carlo_matrix
from .spectral import spectral_matrix

Method = Literal["louvain", "spectral", "monte_carlo", "leiden"]
ROUNDING = 1e-12  # of the largest entry of a modularity matrix: smaller ones are no links
STEPS = 20  # of the Monte-Carlo search, per unit and start


@dataclass(frozen=True)
class Modules:
    """A partition of units into modules.

    labels:     (units,) int64, modules 0, 1, ... in the order of their first unit; -1: a dead unit, in no module
    q:          modularity of the partition
    components: number of connected components of the graph. With more than one, units of two components never share a module
    """

    labels: np.ndarray
    q: float
    components: int = 1

    @property
    def number(self) -> int:
        """Number of modules."""
        return int(self.labels.max(initial=-1)) + 1

    @property
    def soft_number(self) -> float:
        """Effective number of modules, see ``soft_num_clusters``."""
        return soft_num_clusters(self.labels)

    @property
    def dead(self) -> int:
        """Number of units in no module."""
        return int((self.labels < 0).sum())


def find_modules(
    association: Any,
    method: Method = "louvain",
    *,
    absolute: bool = True,
    gamma: float = 1.0,
    starts: int = 10,
    sparsify: float | None = None,
    seed: int | np.random.Generator = 0,
) -> Modules:
    """Finds the modules of one association matrix, by modularity.

    association: (units, units), symmetric; the diagonal does not count. Units without associations, or of NaN, are dead
    method:      louvain (single moves, aggregation, exchanges), spectral (bisection by eigenvectors, without starts), monte_carlo
                 (random walks from the spectral modules), leiden (needs the package leidenalg)
    absolute:    edge weights are absolute values of the associations
    gamma:       resolution; above 1, more and smaller modules
    starts:      number of seeded starts, of which the best is kept
    sparsify:    share of the pairs that keep an edge, of weight 1. None: all, with their weights

    Louvain takes 0.05 s per start for 1,024 units. Memory: a few matrices of this size. Raises ValueError for another method, for
    matrices that are no graph, and for fewer than three live units.

    >>> import numpy as np
    >>> cliques = np.kron(np.eye(3), np.ones((4, 4)))
    >>> found = find_modules(cliques)
    >>> found.number, round(found.q, 4), found.labels.tolist()
    (3, 0.6667, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    """
    rng = seed if isinstance(seed, np.random.Generator) else np.random.default_rng(as_seed(seed))
    graph = Graph.of(association, absolute, sparse=sparsify)
    return modules_of(graph, method, gamma, starts, rng)


def modules_of(graph: Graph, method: Method, gamma: float, starts: int, rng: np.random.Generator) -> Modules:
    """The modules of a graph. Raises ValueError for another method, and for numbers of starts and resolutions out of range."""
    check_options(method, gamma, starts)
    matrix = modularity_matrix(graph.weights, gamma)
    labels = leiden_labels(graph.weights, gamma, starts, rng) if method == "leiden" else _searched(matrix, method, starts, rng)
    labels = connected_parts(graph.weights, labels)  # a module splits between parts without a link: that always increases Q
    components = int(connected_parts(graph.weights).max()) + 1
    return Modules(graph.labels(compact(labels)), quality(matrix, labels), components)


def modules_of_matrix(matrix: np.ndarray, live: np.ndarray, method: Method, starts: int, rng: np.random.Generator) -> Modules:
    """The modules of a modularity matrix of live units, of any null model. Raises ValueError for leiden, which reads a graph."""
    if method == "leiden":
        raise ValueError("method=leiden finds modules of graphs, and null_model=correlation has none: take method=louvain")
    labels = _searched(matrix, method, starts, rng)
    links = matrix > ROUNDING * matrix.max(initial=0)
    if links.any():  # parts of a module without such a link are modules of their own: rounding joined them
        labels = connected_parts(links, labels)
    labels = compact(labels)
    every = np.full(len(live), NONE)
    every[live] = labels
    return Modules(every, quality(matrix, labels))


def check_options(method: str, gamma: float, starts: int) -> None:
    """Raises ValueError for a method that does not exist, and for numbers out of range."""
    if method not in get_args(Method):
        raise ValueError(f"method is {method!r}; it is one of {', '.join(get_args(Method))}")
    if not gamma > 0:
        raise ValueError(f"gamma is {gamma}; a resolution is above 0, and 1 is Newman's modularity")
    if starts < 1:
        raise ValueError(f"starts is {starts}; it is the number of seeded starts, at least 1")


def _searched(matrix: np.ndarray, method: str, starts: int, rng: np.random.Generator) -> np.ndarray:
    if method == "louvain":
        return louvain_matrix(matrix, starts, rng)
    labels = spectral_matrix(matrix)
    if method == "spectral":
        return labels
    walks = [labels, *(monte_carlo_matrix(matrix, labels, rng, STEPS * len(matrix)) for _ in range(starts))]
    return max(walks, key=lambda found: quality(matrix, found))
