"""``analysis=[modularity]``: the modules of every layer, beside those of a null model, by one or several associations."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import pandas as pd
from torch import nn

from nodelens.analysis.base import Analysis, AnalysisCall
from nodelens.engine.associations import ALL_LAYERS
from nodelens.engine.saved_work import part
from nodelens.metrics import Metric, get_metric
from nodelens.results.findings import Findings
from nodelens.results.result import Result
from nodelens.statistics.seeding import seed_of

from .columns import drawn_units, is_stack, label_columns, units_of
from .connectivity import connectivity_table
from .epochs import follow_epochs
from .find_modules import Method, check_options
from .graph import NONE, as_matrix
from .layer_modules import COVARIANCES, LayerModules, Null, Search, sorted_matrix
from .tables import MODULES, Partitioned, comparison_table, within


@dataclass(frozen=True)
class ModularityAnalysis(Analysis):
    """Finds the modules of the units of each layer, by one or several associations, and compares them.

    associations: names of metrics of pairs of units, or {column: metric}
    stacked:      also find the modules of the units of all layers together, by one matrix of them, as the layer ``all``
    absolute:     edge weights are absolute values of the associations
    gamma:        resolution; above 1, more and smaller modules
    method:       louvain, spectral, monte_carlo or leiden (which needs the package leidenalg)
    starts:       seeded starts of a search, of which the best is kept
    sparsify:     share of the pairs that keep an edge, of weight 1. None: all, with their weights
    shuffles:     number of random graphs for z and p, and p is at least 1 / (shuffles + 1)
    null_model:   degrees: graphs with the same weights and degrees. correlation: for covariances, what a random correlation matrix
                  leaves (MacMahon & Garlaschelli 2015); it takes signed correlations, and other associations keep degrees. none
    rows:         number of independent rows of the null model of correlations. None: the number of samples
    alignments:   number of shuffles of units, for the p of an alignment

    Source: Lange, Rolnick & Kording 2022, Clustering units in neural networks: upstream vs downstream information, TMLR.

    Raises ValueError for values out of range, and for metrics that are not of pairs of units.
    """

    associations: str | Sequence[str] | Mapping[str, Metric] = ("forward_cov", "backward_ggn")
    stacked: bool = False
    absolute: bool = True
    gamma: float = 1.0
    method: Method = "louvain"
    starts: int = 5
    sparsify: float | None = None
    shuffles: int = 20
    null_model: Null = "degrees"
    rows: int | None = None
    alignments: int = 1000

    def __post_init__(self) -> None:
        check_options(self.method, self.gamma, self.starts)
        if self.null_model not in get_args(Null):
            raise ValueError(f"null_model is {self.null_model!r}; it is one of {', '.join(get_args(Null))}")
        if self.sparsify is not None and not 0 < self.sparsify <= 1:
            raise ValueError(f"sparsify is {self.sparsify}; it is the share of pairs that keep an edge, above 0 and at most 1")
        if self.null_model == "correlation" and (self.sparsify is not None or self.method == "leiden"):
            raise ValueError("null_model=correlation reads the correlations themselves: leave sparsify and method=leiden out")
        for name in ("shuffles", "alignments"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a number of random draws, 0 for none")
        if self.rows is not None and self.rows < 2:
            raise ValueError(f"rows is {self.rows}; it is a number of independent rows, at least 2")
        self.required_metrics()

    def required_metrics(self) -> dict[str, Metric]:
        """The associations, as matrices."""
        if isinstance(self.associations, Mapping):
            found = dict(self.associations)
        else:
            names = [self.associations] if isinstance(self.associations, str) else self.associations
            found = {str(name): _as_matrix(str(name), self.stacked) for name in names}
        if not found:
            raise ValueError("associations is empty; give names of metrics of pairs of units, such as forward_cov")
        for name, metric in found.items():
            if metric.shape != "pair":
                raise ValueError(f"{name} has one value per {metric.shape}, and modules are found in a metric of pairs of units")
        if self.stacked and not any(metric.options.get("stacked") for metric in found.values()):
            raise ValueError(
                f"stacked: {', '.join(found)} has no matrix of the units of all layers: add an association that has one, such as "
                "forward_cov, or leave stacked out"
            )
        return found

    def run(self, model: nn.Module, data: Iterable[Any], call: AnalysisCall) -> Findings:
        """Reads the matrices of the result, and no data."""
        result, seed = call.measured, call.seed
        metrics, gaps = self.required_metrics(), _Gaps()
        places = [(str(layer), name) for layer in result.layers.index for name in metrics]
        places += [(ALL_LAYERS, name) for name, metric in metrics.items() if metric.options.get("stacked")]
        found = {place: modules for place in places if (modules := self._modules(call, *place, gaps)) is not None}
        parts = [
            Partitioned({"layer": layer, "association": name}, each.modules.labels, result.matrices[layer, name])
            for (layer, name), each in found.items()
        ]
        options = {"absolute": self.absolute, "gamma": self.gamma, "shuffles": self.alignments, "seed": seed}
        rows = [{"layer": layer, "association": name, **each.row()} for (layer, name), each in found.items()]
        frames = {
            "modules": pd.DataFrame(rows, columns=list(MODULES)),
            "comparison": comparison_table(within(parts, "association"), "association", ["layer"], **options),
            "connectivity": _connectivity(result, found),
        }
        about = {"options": _plain_options(self), "seed": seed, "missing": gaps.rows, "notes": gaps.notes}
        pictures = {(layer, f"sorted_{name}"): sorted_matrix(each) for (layer, name), each in found.items()}
        lines = [*_summary(frames), *gaps.lines()]
        labels = {key: _of_every_unit(result, key[0], each.modules.labels) for key, each in found.items()}
        columns = label_columns(result.units.index, labels, metrics)
        return Findings("modularity", frames, lines, columns, pictures, about)

    def over_epochs(self, found: Mapping[int, Findings], seed: int = 0) -> Findings:
        """How the modules change during training, from what was found after each epoch."""
        return follow_epochs(found, self.alignments, seed)

    def _modules(self, call: AnalysisCall, layer: str, name: str, gaps: "_Gaps") -> LayerModules | None:
        result = call.measured
        matrix = result.matrices.get((layer, name))
        if matrix is None:
            gaps.add(layer, name, _why_not_measured(result, layer, name))
            return None
        own = f"{layer}, {name}, {hashlib.sha256(matrix.tobytes()).hexdigest()}"
        try:
            found = part(call.saved, own, lambda: self._searched(result, matrix, layer, name, call.seed).state_dict())
        except ValueError as error:
            gaps.add(layer, name, str(error))
            return None
        return self._noted(LayerModules.of_state(found), result, layer, name, gaps)

    def _searched(self, result: Result, matrix: np.ndarray, layer: str, name: str, seed: int) -> LayerModules:
        search = Search(self.absolute, self.gamma, self.method, self.starts, self.sparsify, self.shuffles, self.null_model)
        rng = np.random.default_rng(seed_of(seed, layer, name))
        if self.null_model == "correlation" and name in COVARIANCES:
            return search.of_correlations(matrix, self.rows or result.metadata["samples"], rng)
        return search(matrix, rng)

    def _noted(self, found: LayerModules, result: Result, layer: str, name: str, gaps: "_Gaps") -> LayerModules:
        matrix = result.matrices[layer, name]
        gaps.about(layer, name, found, matrix)
        if drawn_units(result, layer, len(matrix)) is not None:
            gaps.notes.append(f"{layer}, {name}: modules of the {len(matrix)} units that were drawn; the others are in none")
        return found


@dataclass
class _Gaps:
    """What could not be computed, and what a reader has to know about what was."""

    rows: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, layer: str, name: str, reason: str) -> None:
        self.rows.append({"layer": layer, "what": f"module_{name}", "reason": reason})

    def about(self, layer: str, name: str, found: LayerModules, matrix: np.ndarray) -> None:
        undefined = int(np.isnan(as_matrix(matrix)).all(1).sum())
        if undefined:
            reason = (
                f"{undefined} of {len(matrix)} units have no association with any unit (NaN), as units that do not vary: they "
                "are in no module; remove them, or measure more rows"
            )
            self.add(layer, name, reason)
        if found.modules.components > 1:
            self.notes.append(
                f"{layer}, {name}: the graph has {found.modules.components} components without links between them, and each is at "
                "least one module, so part of Q is theirs: compare z and p, or leave sparsify out"
            )

    def lines(self) -> list[str]:
        return [f"{row['layer']}, {row['what'].removeprefix('module_')}: {row['reason']}" for row in self.rows] + self.notes


def _as_matrix(name: str, stacked: bool) -> Metric:
    """A metric of pairs that returns the matrix, where it would return the mean over partners; stacked: also that of all layers."""
    metric = get_metric(name)
    wanted = {"reduce": "none"} | ({"stacked": True} if stacked else {})
    options = {key: value for key, value in wanted.items() if key in metric.options and metric.kind == "pair"}
    return get_metric(name, **options) if options else metric


def _why_not_measured(result: Result, layer: str, name: str) -> str:
    """The reason why a result has no matrix of a layer, with the way out."""
    known = (each for each in result.metadata.get("missing") or [] if each["layer"] == layer and each["column"] == name)
    reason = next((str(each["reason"]) for each in known), "")
    if reason:
        return reason if "leave " in reason else f"{reason}; leave the layer out, or the association"
    if is_stack(result.units.index, layer):
        return f"{name} has no matrix of all layers, which takes one pass: raise the budget, or leave stacked out"
    return f"{name} was not measured: leave the layer out, or the association"


def _of_every_unit(result: Result, layer: str, labels: np.ndarray) -> np.ndarray:
    """Labels of all units of a layer, -1 for those that were not drawn."""
    drawn = drawn_units(result, layer, len(labels))
    if drawn is None:
        return labels
    every = np.full(units_of(result, layer), NONE)
    every[drawn] = labels
    return every


def _connectivity(result: Result, found: Mapping[tuple[str, str], LayerModules]) -> pd.DataFrame:
    """One row per live unit of each layer and association."""
    tables = []
    for (layer, name), each in found.items():
        drawn, count = drawn_units(result, layer, len(each.modules.labels)), len(each.modules.labels)
        tables.append(connectivity_table(each, np.arange(count) if drawn is None else drawn))
        tables[-1].insert(0, "layer", layer)
        tables[-1].insert(1, "association", name)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["layer", "association", "unit"])


def _summary(frames: Mapping[str, pd.DataFrame]) -> list[str]:
    lines = []
    for row in frames["modules"].itertuples():
        number = f"{row.modules} module{'s' * (row.modules != 1)} of {row.units - row.dead} units"
        tested = "" if np.isnan(row.p) else f"; {row.q_null:.3f} by chance ({row.null_model}), z {row.z:.1f}, p {row.p:.2g}"
        lines.append(f"{row.layer}, {row.association}: {number}, Q {row.q:.3f}{tested}")
    for row in frames["comparison"].itertuples():
        chance = "" if np.isnan(row.alignment_p) else f" ({row.alignment_null:.2f} by chance, p {row.alignment_p:.2g})"
        pair = f"{row.association_a} and {row.association_b}"
        lines.append(f"{row.layer}, {pair}: alignment {row.alignment:.2f}{chance}, AMI {row.ami:.2f}")
    return lines


def _plain_options(analysis: ModularityAnalysis) -> dict[str, Any]:
    metrics = {name: metric.options for name, metric in analysis.required_metrics().items()}
    options = {name: value for name, value in vars(analysis).items() if name != "associations"}
    return options | {"associations": metrics}
