"""The modules of one layer by one association, beside those of a null model."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from .correlation_null import correlation_matrix, groups_matrix, random_correlations
from .find_modules import Method, Modules, modules_of, modules_of_matrix
from .graph import Graph, as_matrix, connected_parts
from .shuffles import shuffled
from .significance import Significance

Null = Literal["degrees", "correlation", "none"]
WIDEST = 256  # cells of a picture of a graph; a wider one is averaged over blocks of units
COVARIANCES = ("forward_cov", "forward_cov_norm")  # associations that the null model of correlations is about


@dataclass(frozen=True)
class Search:
    """How modules are found and tested; the fields are those of ``ModularityAnalysis``."""

    absolute: bool
    gamma: float
    method: Method
    starts: int
    sparsify: float | None
    shuffles: int
    null_model: Null

    def __call__(self, association: np.ndarray, rng: np.random.Generator) -> "LayerModules":
        """Modules by modularity, and the largest modularity of graphs with the same degrees."""
        graph = Graph.of(association, self.absolute, sparse=self.sparsify)
        found = modules_of(graph, self.method, self.gamma, self.starts, rng)
        return LayerModules(found, Significance.of(found.q, self._of_shuffles(graph, rng)), graph, "degrees")

    def _of_shuffles(self, graph: Graph, rng: np.random.Generator) -> Iterator[float]:
        for weights in shuffled(graph.weights, 0 if self.null_model == "none" else self.shuffles, rng):
            yield modules_of(Graph(weights, graph.live), self.method, self.gamma, self.starts, rng).q

    def of_correlations(self, covariance: np.ndarray, rows: int, rng: np.random.Generator) -> "LayerModules":
        """Modules of what a random correlation matrix does not explain, and those of random ones."""
        graph = Graph.of(covariance, absolute=False, signed=True)
        correlations = correlation_matrix(as_matrix(covariance)[np.ix_(graph.live, graph.live)])
        components = int(connected_parts(graph.weights).max()) + 1
        found = replace(self._in_correlations(correlations, graph.live, rows, rng), components=components)
        drawn = random_correlations(len(correlations), rows, self.shuffles, rng)
        null = Significance.of(found.q, (self._in_correlations(each, graph.live, rows, rng).q for each in drawn))
        return LayerModules(found, null, Graph(correlations - np.eye(len(correlations)), graph.live), "correlation")

    def _in_correlations(self, correlations: np.ndarray, live: np.ndarray, rows: int, rng: np.random.Generator) -> Modules:
        return modules_of_matrix(groups_matrix(correlations, rows), live, self.method, self.starts, rng)


@dataclass(frozen=True)
class LayerModules:
    """Modules of a layer, their significance, the graph that they were found in, and the null model."""

    modules: Modules
    null: Significance
    graph: Graph
    model: str

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain values, which can be saved."""
        graph = {"weights": torch.from_numpy(self.graph.weights), "live": torch.from_numpy(self.graph.live)}
        modules = {"labels": torch.from_numpy(self.modules.labels), "q": self.modules.q, "components": self.modules.components}
        return {"graph": graph, "modules": modules, "null": vars(self.null), "model": self.model}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> "LayerModules":
        """What ``state_dict`` returned."""
        graph = Graph(*(state["graph"][name].numpy() for name in ("weights", "live")))
        modules = Modules(state["modules"]["labels"].numpy(), state["modules"]["q"], state["modules"]["components"])
        return cls(modules, Significance(**state["null"]), graph, state["model"])

    def row(self) -> dict[str, float | int | str]:
        """The values of the table of modules."""
        found, null = self.modules, self.null
        counts: dict[str, float | int | str] = {
            "units": len(found.labels),
            "dead": found.dead,
            "modules": found.number,
            "soft_number": found.soft_number,
        }
        tested: dict[str, float | int | str] = {
            "q_null": null.mean,
            "q_null_std": null.std,
            "z": null.z,
            "p": null.p,
            "null_model": self.model,
        }
        return {"q": found.q, **counts, "components": found.components, **tested}


def sorted_matrix(found: LayerModules) -> np.ndarray:
    """Weights between live units, largest module first, (cells, cells) float32: one cell per unit, or means over blocks."""
    labels = found.modules.labels[found.graph.live]
    sizes = np.bincount(labels)
    order = np.lexsort((np.arange(len(labels)), labels, -sizes[labels]))
    weights = found.graph.weights[np.ix_(order, order)]
    cells = np.arange(len(order)) * min(len(order), WIDEST) // len(order)
    starts = np.flatnonzero(np.diff(cells, prepend=-1))
    counts = np.diff(starts, append=len(order))
    sums = np.add.reduceat(np.add.reduceat(weights, starts, 0), starts, 1)
    return (sums / np.outer(counts, counts)).astype(np.float32)
