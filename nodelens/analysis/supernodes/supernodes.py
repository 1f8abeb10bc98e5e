"""Supernodes: the few hidden units with most of the loss proxy, their halo, and checks of the scores (2604.23475)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args, get_type_hints

import pandas as pd
import torch
from torch import Tensor, nn

from nodelens.analysis.ablation.ablate import Setting
from nodelens.analysis.ablation.targets import AblationTarget, sample_units
from nodelens.analysis.base import Analysis, AnalysisCall
from nodelens.engine.driver import device_of, shared_first
from nodelens.metrics.gradient import LossReduction
from nodelens.metrics.supernode import correlations, halo, largest, redundancy_to_supernodes, share_of
from nodelens.network.group_layer import GroupLayer
from nodelens.network.groups import PruningGroup, PruningGroups
from nodelens.network.objective import Objective
from nodelens.pruning.groups.find import find_groups
from nodelens.results.result import fingerprint, provenance
from nodelens.statistics.linalg import gaussian_information

from .agreement import agreement, hits
from .controls import COLUMNS, ControlSets, control_rows
from .cores import COLUMNS as CORES
from .cores import check_cores, core_rows, cores_of, halos_of
from .hidden import HiddenPass, ProductSums, Unit, UnitSums
from .robustness import Resample, resample_scores
from .supernode_result import SupernodesResult
from .supernode_tables import SCORES, GroupConnectivity, concentration_table, layer_rows, read_connectivity, unit_scores, unit_table

Found = Mapping[tuple[str, str], Tensor]
_SCOPES = {"heads": ("head", "kv_group"), "experts": ("moe_ffn",), "channels": ("channel",)}
Score = Literal["loss_proxy", "loss_proxy_factored", "taylor", "curvature", "power"]


@dataclass(frozen=True)
class Supernodes(Analysis):
    """Scores hidden units, finds the few with most of the loss proxy (supernodes) and the halo that repeats them, with controls.

    scope: groups by kind (ffn, heads, channels), name or pattern. unit: one row per ``token`` that a linear layer reads, or per
    ``sequence`` (or image), summed over positions. score: ranks the supernodes; the halo's scores use the loss proxy. top_k:
    number of supernodes per group, instead of a share. cores: number of cores into which the supernodes of a group are divided, by
    k-means on the directions of their outgoing weights; each unit of the halo belongs to one. loss_reduction: ``mean`` divides the
    gradients of a sample by its number of predictions; with corr_eps 1e-8 this reproduces the published code. draws: number of
    random sets. groups: groups of samples for standard errors and ``resamples``. ablate: number of units per group to ablate one
    by one, drawn uniformly (0: none, or all), on ``ablate_tokens`` predictions.
    """

    scope: str | Sequence[str] = "ffn"
    unit: Unit = "token"
    score: Score = "loss_proxy"
    supernode_fraction: float = 0.01
    min_supernodes: int = 1
    top_k: int | None = None
    cores: int = 1
    halo_fraction: float = 0.1
    connectivity_topk: int = 256
    connectivity_mass_fraction: float | None = None
    redundancy_topk: int = 5
    redundancy_reduce: Literal["topk_mean", "max"] = "topk_mean"
    positive_redundancy: bool = True
    corr_eps: float = 0.0
    protection: Literal["rank_power", "rank", "minmax"] = "rank_power"
    protection_floor: float = 0.2
    protection_rank_power: float = 8.0
    loss_reduction: LossReduction = "sum"
    draws: int = 20
    groups: int = 32
    resamples: int = 20
    resample: Resample = "halves"
    ablate: int | str = 0
    ablate_tokens: int | None = 16_384

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name, value in vars(self).items():
            choices = get_args(hints[name])
            if choices and all(isinstance(choice, str) for choice in choices) and value not in choices:
                raise ValueError(f"supernodes: {name} is {value!r}; it must be one of {', '.join(choices)}")
        for name in ("supernode_fraction", "halo_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"supernodes: {name} is {getattr(self, name)!r}; it must be a share between 0 and 1")
        if self.cores < 1:
            raise ValueError(f"supernodes: cores is {self.cores}; it is a number of cores per group, 1 or more")
        if self.ablate != "all" and (isinstance(self.ablate, (bool, str)) or self.ablate < 0):
            raise ValueError(f"ablate is {self.ablate!r}; it must be 0 (no ablation), a number of units per group, or all")

    def run(self, model: nn.Module, data: Iterable[Any], call: AnalysisCall) -> SupernodesResult:
        """Reads data twice, with a backward pass each, and ``evaluation`` (default: data) once for ablation.

        task, output, loss: as in ``AnalyzeOptions``; ablation measures the cross-entropy of the task.

        Memory does not grow with the data. Under a process group each process gives its own share of both. Raises ValueError for a
        scope without groups, for units that are never observed, and for data that are empty, unlabelled or readable only once.
        """
        if isinstance(data, Iterator):
            raise ValueError("supernodes reads its data twice, but they are an iterator: give a loader or a list of batches")
        objective, seed, progress = Objective.of(model, **call.objective), call.seed, call.progress
        first, _ = shared_first(data, objective)
        objective = objective if first is None else objective.settled(model, first)
        groups, device = self._groups(model, objective, first), device_of(model)
        for group in groups:
            check_cores(group.name, self._supernode_count(group.n), self.cores)
        hidden = HiddenPass(model, groups, self.unit, self.loss_reduction, self.groups, seed)
        sums = UnitSums(groups, self.groups, device)
        samples = hidden.run(progress(data), sums, objective, call.saved)
        sums.reduce()
        layouts = [self._layout(model, group, sums.found, seed) for group in groups]
        chosen = {layout.group.name: layout.controls for layout in layouts}
        products = ProductSums({name: (c.rows, c.columns) for name, c in chosen.items()}, device)
        hidden.run(progress(data), products, objective, call.saved)
        products.reduce()
        tables = self._tables(model, layouts, sums.found, products.found, seed)
        ablated, about = self._ablated(model, groups, objective, call)
        tables |= self._agreement(tables["units"], ablated, seed)
        about = {"ablation": about, "samples": samples, "rows": int(sums.found[groups[0].name, "rows"].sum())}
        return SupernodesResult(**tables, ablation=ablated, metadata=about | self._about(model, groups, seed))

    def _groups(self, model: nn.Module, objective: Objective, first: Any) -> list[PruningGroup]:
        batch = None if first is None else objective.batch(first).head(2).to(device_of(model))
        every = find_groups(model, batch)
        words = [self.scope] if isinstance(self.scope, str) else [str(word) for word in self.scope]
        kinds = {group.kind for group in every}
        if not every:
            why = "; ".join(f"{frozen.what}: {frozen.reason}" for frozen in every.frozen[:4]) or "no layer is recognised"
            raise ValueError(f"{type(model).__name__} has no group of hidden units: {why}")
        return list(
            PruningGroups(every.groups, every.frozen).chosen(
                [w for word in words for w in _group_kinds(word, kinds)], allow_approximate=True
            )
        )

    def _supernode_count(self, n: int) -> int:
        return min(n, self.top_k) if self.top_k is not None else share_of(n, self.supernode_fraction, self.min_supernodes)

    def _layout(self, model: nn.Module, group: PruningGroup, sums: Found, seed: int) -> GroupConnectivity:
        """Supernodes, halo and control sets of a group."""
        values = unit_scores(group, sums)
        supernodes = largest(values[self.score], self._supernode_count(group.n))
        layout = GroupConnectivity.of(model, group, supernodes, self.connectivity_topk, self.connectivity_mass_fraction)
        members = halo(layout.connectivity, supernodes, self.halo_fraction)
        mutual = self.cores > 1
        sets = ControlSets.of(group.name, values["loss_proxy"], supernodes, members, self.draws, seed, mutual)
        return layout.with_controls(sets)

    def _tables(
        self,
        model: nn.Module,
        layouts: Sequence[GroupConnectivity],
        sums: Found,
        products: Mapping[str, Tensor],
        seed: int,
    ) -> dict[str, pd.DataFrame]:
        units, layers, controls, resamples, curves, cores = [], [], [], [], [], list[dict[str, Any]]()
        reads = read_connectivity(model, layouts)
        for layout in layouts:
            name, sets = layout.group.name, layout.controls
            redundancy = self._redundancy(layout, sums, products[name])
            own = redundancy(sets.halo, sets.supernodes)
            rule = (self.protection, self.protection_floor, self.protection_rank_power)
            table = unit_table(model, layout, sums, own, reads[name], rule, self.halo_fraction)
            if self.cores > 1:
                table["core"], rows = self._cores(model, layout, sums, products[name], seed)
                cores += rows
            found = control_rows(name, sets, redundancy, layout.connectivity, seed)
            share = len(sets.supernodes) / layout.group.n
            drawn = resample_scores(name, sums[name, "square"], sums[name, "rows"], share, self.resamples, self.resample, seed)
            units.append(table)
            controls += found
            resamples += drawn
            curves.append(concentration_table(name, table["loss_proxy"]))
            layers.append(layer_rows(layout, table, sums, found, drawn, seed))
        return {
            "units": pd.concat(units),
            "layers": pd.DataFrame(layers).set_index("layer"),
            "controls": pd.DataFrame(controls, columns=list(COLUMNS)),
            "robustness": pd.DataFrame(resamples, columns=["layer", "draw", "jaccard", "spearman"]),
            "concentration": pd.concat(curves, ignore_index=True),
            "cores": pd.DataFrame(cores, columns=list(CORES)),
        }

    def _cores(
        self, model: nn.Module, layout: GroupConnectivity, sums: Found, products: Tensor, seed: int
    ) -> tuple[list[int], list[dict[str, Any]]]:
        """The core of each unit, -1 for those that are neither supernode nor in the halo, and a row per core."""
        sets, columns = layout.controls, GroupLayer.of(model, layout.group).columns.cpu()
        cores = cores_of(layout.group.name, columns, sets.supernodes, self.cores, seed)
        own = halos_of(columns, sets.supernodes, cores, sets.halo, self.connectivity_topk, self.connectivity_mass_fraction)
        pairs = self._pairs(layout, sums, products)
        labels = torch.full((layout.group.n,), -1).index_copy(0, sets.supernodes, cores).index_copy(0, sets.halo, own)
        return labels.tolist(), core_rows(layout.group.name, sets.supernodes, cores, sets.halo, own, pairs)

    def _redundancy(self, layout: GroupConnectivity, sums: Found, products: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """A function of (units, supernodes), both ids, that returns the redundancy of these units to the supernodes, (units,)."""
        correlated = self._correlated(layout, sums, products)

        def redundancy(units: Tensor, supernodes: Tensor) -> Tensor:
            rho = correlated(units, supernodes)
            return redundancy_to_supernodes(rho, self.redundancy_topk, self.redundancy_reduce, self.positive_redundancy)

        return redundancy

    def _pairs(self, layout: GroupConnectivity, sums: Found, products: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """A function of (units, others), both ids, that returns the redundancy of each pair, (units, others)."""
        correlated = self._correlated(layout, sums, products)

        def pairs(units: Tensor, others: Tensor) -> Tensor:
            rho = correlated(units, others)
            return gaussian_information((rho.clamp_min(0) if self.positive_redundancy else rho).square())

        return pairs

    def _correlated(self, layout: GroupConnectivity, sums: Found, products: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """A function of (units, others), both ids, that returns the correlations of their q, (units, others)."""
        name = layout.group.name
        n, total, square = sums[name, "rows"].sum(), sums[name, "total"], sums[name, "square"].sum(0)
        variance = (square / n - (total / n).square()).clamp_min(0)
        rows, columns = layout.controls.rows, layout.controls.columns

        def correlated(units: Tensor, others: Tensor) -> Tensor:
            i, s = torch.searchsorted(rows, units), torch.searchsorted(columns, others)
            shared = products[i][:, s] / n - total[units, None] * total[others] / n.square()
            return correlations(shared, variance[units], variance[others], self.corr_eps)

        return correlated

    def _ablated(
        self, model: nn.Module, groups: Sequence[PruningGroup], objective: Objective, call: AnalysisCall
    ) -> tuple[pd.DataFrame, dict[str, Any]]:
        drawn = sample_units([(group.name, group.n) for group in groups], self.ablate, call.seed)
        units = [(name, unit) for name, ids in drawn.items() for unit in ids]
        index = pd.MultiIndex.from_tuples(units, names=["layer", "unit"])
        if not units:
            return pd.DataFrame(columns=["change", "change_se"], index=index, dtype=float), {}
        targets = [AblationTarget.of_group(model, group) for group in groups]
        setting = Setting(model, call.evaluation, replace(objective, loss=None), targets, call.saved)
        removed = [{name: [unit]} for name, unit in units]
        found = setting.damage(removed, predictions=self.ablate_tokens, seed=call.seed, progress=call.progress)
        about = {"loss": found.loss, "predictions": found.predictions, "samples": found.samples}
        return pd.DataFrame({"change": found.change, "change_se": found.error}, index=index), about

    def _agreement(self, units: pd.DataFrame, ablated: pd.DataFrame, seed: int) -> dict[str, pd.DataFrame]:
        scores = [name for name in SCORES if name in units]
        table = ablated.join(units[scores])
        if not len(table):
            return {"agreement": agreement(table, ()), "hits": hits(table, ())}
        return {"agreement": agreement(table, scores, seed=seed), "hits": hits(table, scores)}

    def _about(self, model: nn.Module, groups: Sequence[PruningGroup], seed: int) -> dict[str, Any]:
        options = asdict(self) | {"scope": self.scope if isinstance(self.scope, str) else list(self.scope)}
        found = {"class": type(model).__name__, "fingerprint": fingerprint(model)}
        notes = {"sampling": "uniform without replacement", "redundancy_noise": "1 / (2 rows) nats", "unit": self.unit}
        return provenance() | notes | {"options": options, "groups": [a.name for a in groups], "seed": seed, "model": found}


def _group_kinds(word: str, kinds: set[str]) -> list[str]:
    """The kinds of group that a word of the scope stands for: ``heads`` are of two kinds."""
    return [kind for kind in _SCOPES.get(word, ()) if kind in kinds] or [word]
