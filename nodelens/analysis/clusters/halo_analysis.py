"""The analysis ``halo``: which units of the next layer read most from the critical units of a layer, and flow between clusters."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from nodelens.analysis.base import Analysis, AnalysisCall
from nodelens.messages import nearest
from nodelens.metrics import Metric
from nodelens.metrics.supernode import share_of
from nodelens.results.files import plain
from nodelens.results.findings import Findings
from nodelens.results.result import Result

from .clusters_analysis import ClustersAnalysis
from .influence import CrossLayerHaloAnalysis, flow_null, halo_null
from .next_layers import NextLayer, deviations, next_layers
from .unit_types import NONE

UNIT_TYPE = "unit_type"
OTHERS = "others"


@dataclass(frozen=True)
class HaloAnalysis(Analysis):
    """Finds the halo of a cluster in the next layer: the units that get most of their input from it, with permutation baselines.

    column, value: the cluster, the units with this value in a column of the table of units. top: instead of a value, the share of
    a layer's units with the largest values of the column, such as column=taylor, top=0.1. If the table has no column ``unit_type``,
    the types are found as the analysis ``clusters`` does, with the options ``clusters``. percentile, use_activation_weight: as in
    ``CrossLayerHaloAnalysis``. permutations: of the baselines. suffix: appended to the names of the columns of units, for a second
    analysis of this kind.

    The next layer is the one that reads the units (see ``next_layers``); a layer whose units several layers read has a row for
    each. Tables: ``pairs`` (one row per layer and next layer), ``receivers`` (one row per unit of a next layer), ``flow`` (one row
    per pair of clusters). Columns of units: ``in_halo`` and ``halo_share``, of the units of a next layer, the largest over the
    layers it reads. What cannot be computed is listed with the reason in ``metadata["missing"]``.
    """

    column: str = UNIT_TYPE
    value: Any = "critical"
    top: float | None = None
    percentile: float = 90.0
    use_activation_weight: bool = True
    permutations: int = 1000
    suffix: str = ""
    clusters: ClustersAnalysis = field(default_factory=lambda: ClustersAnalysis(draws=0, ablations=False))

    def __post_init__(self) -> None:
        CrossLayerHaloAnalysis(self.percentile)
        if self.top is not None and not 0 < self.top < 1:
            raise ValueError(f"halo: top is {self.top}; it is a share of the units of a layer, between 0 and 1")
        if self.permutations < 1:
            raise ValueError(f"halo: permutations is {self.permutations}; it is 1 or more")

    def required_metrics(self) -> dict[str, Metric]:
        """Those of the clusters, where the types are read."""
        return self.clusters.required_metrics() if self.column == UNIT_TYPE else {}

    def run(self, model: nn.Module, data: Iterable[Any], call: AnalysisCall) -> Findings:
        """Reads data once for weighted connections. Raises ValueError for a column that the run does not have."""
        result, seed, missing = call.measured, call.seed, list[dict[str, str]]()
        labels = self._labels(model, data, result, seed, missing)
        names = [str(name) for name in dict.fromkeys(labels.index.get_level_values("layer"))]
        pairs, reasons = next_layers(model, data, names, **call.objective)
        outputs = result.metadata.get("outputs") or []
        missing += [{"layer": k, "what": "halo", "reason": reason} for k, reason in reasons.items() if k not in outputs]
        readers = list(dict.fromkeys(pair.next for pair in pairs))
        weighted = self.use_activation_weight and bool(readers)
        kept = {} if call.saved is None else {"save_to": call.saved.folder, "save_minutes": call.saved.minutes}
        spread = deviations(model, data, readers, seed, call.progress, **kept, **call.objective) if weighted else {}
        frames: dict[str, list[pd.DataFrame]] = {"pairs": [], "receivers": [], "flow": []}
        for pair in pairs:
            try:
                self._of_pair(model, pair, labels, spread, seed, frames)
            except ValueError as error:  # the other layers go on
                missing.append({"layer": pair.layer, "what": f"halo in {pair.next}", "reason": str(error)})
        tables = {name: pd.concat(parts, ignore_index=True) if parts else pd.DataFrame() for name, parts in frames.items()}
        about = {"options": plain(vars(self)), "seed": seed, "missing": missing}
        columns = _unit_columns(tables["receivers"], result.units.index).add_suffix(self.suffix)
        return Findings("halo", tables, self._lines(tables, missing), columns, metadata=about)

    def _labels(self, model: nn.Module, data: Iterable[Any], result: Result, seed: int, missing: list[dict]) -> pd.Series:
        """The cluster of each unit, as text: the column, or ``value`` and ``others``."""
        units = result.units
        if self.column == UNIT_TYPE and UNIT_TYPE not in units:
            found = self.clusters(model, data, result=result, seed=seed)
            missing += found.metadata["missing"]
            assert found.units is not None
            units = found.units
        if self.column not in units:
            raise ValueError(
                f"halo reads the column {self.column!r}, and the table of units has none.{nearest(self.column, map(str, units))} "
                f"It has {', '.join(map(str, units)) or 'none'}: measure it, or run its analysis before halo"
            )
        column = units[self.column]
        if self.top is not None:
            return column.groupby(level="layer", sort=False, group_keys=False).apply(self._largest)
        if pd.api.types.is_float_dtype(column):
            raise ValueError(
                f"halo: {self.column!r} has numbers, not clusters: give top=, a share such as top=0.1, in place of value"
            )
        return column.astype(str)

    def _largest(self, values: pd.Series) -> pd.Series:
        known = values.astype(float).dropna().sort_values(ascending=False, kind="stable")
        chosen = known.index[: share_of(len(values), self.top or 0)]
        return pd.Series(OTHERS, index=values.index).where(~values.index.isin(chosen), self.cluster)

    @property
    def cluster(self) -> str:
        """The name of the cluster whose halo is found."""
        return f"top {100 * self.top:g} %" if self.top is not None else str(self.value)

    def _of_pair(
        self,
        model: nn.Module,
        pair: NextLayer,
        labels: pd.Series,
        spread: dict[str, Any],
        seed: int,
        frames: dict[str, list[pd.DataFrame]],
    ) -> None:
        """Adds the rows of a layer and the next one to the tables. Raises ValueError for a layer without units of the cluster."""
        own = labels.loc[pair.layer].to_numpy()
        cluster = own == self.cluster
        if not cluster.any():
            there = ", ".join(sorted(set(own) - {NONE})) or "none"
            raise ValueError(
                f"layer {pair.layer!r} has no unit with {self.column} {self.cluster!r}; it has {there}: choose another value"
            )
        influence = pair.influence(model, len(own), spread.get(pair.next)).numpy()
        if not np.isfinite(influence).all():
            raise ValueError(f"layer {pair.next!r} has weights or inputs that are not finite: leave the layer out")
        halo, share = CrossLayerHaloAnalysis(self.percentile).find_halo(influence, cluster)
        receivers = pd.DataFrame({"layer": pair.layer, "next": pair.next, "unit": np.arange(len(share)), "share": share})
        receivers["halo"] = receivers["unit"].isin(halo)
        frames["receivers"].append(receivers)
        tested = halo_null(influence, cluster, self.percentile, self.permutations, seed)
        row = {"layer": pair.layer, "next": pair.next, "cluster": self.cluster, "units": int(cluster.sum()), "halo": len(halo)}
        of_all = influence[:, cluster].sum() / influence.sum() if influence.sum() > 0 else np.nan
        frames["pairs"].append(pd.DataFrame([row | {"share_of_all": of_all, **tested}]))
        in_table = pair.next in set(labels.index.get_level_values("layer"))
        targets = labels.loc[pair.next].to_numpy() if in_table else np.where(receivers["halo"], "halo", OTHERS)
        table = flow_null(influence, own, targets, self.permutations, seed)
        frames["flow"].append(table.assign(layer=pair.layer, next=pair.next)[["layer", "next", *table]])

    def _lines(self, tables: dict[str, pd.DataFrame], missing: list[dict[str, str]]) -> list[str]:
        lines, pairs, flow = [], tables["pairs"], tables["flow"]
        if len(pairs):
            above = int((pairs["p"] <= 0.05).sum())
            lines.append(
                f"halo of {self.cluster} units in {len(pairs)} next layers: {100 * pairs['share'].mean():.0f} % of its input comes "
                f"from them, {100 * pairs['null'].mean():.0f} % from random units (p <= 0.05 in {above} of {len(pairs)})"
            )
            strong = flow[(flow["p"] <= 0.05) & (flow["source"] != NONE)]
            lines.append(f"flow between clusters above the baseline (p <= 0.05): {len(strong)} of {len(flow)} pairs")
        return lines + [f"{each['layer']} is left out: {each['reason']}" for each in missing]


def _unit_columns(receivers: pd.DataFrame, index: pd.Index) -> pd.DataFrame:
    """Columns for the table of units: whether a unit is in a halo, and the largest share of its input that comes from a cluster."""
    columns = pd.DataFrame({"in_halo": False, "halo_share": np.nan}, index=index)
    if len(receivers):
        found = receivers.groupby(["next", "unit"]).agg(in_halo=("halo", "any"), halo_share=("share", "max"))
        found.index = found.index.set_names(["layer", "unit"])
        columns.update(found[["halo_share"]])
        columns["in_halo"] = found["in_halo"].reindex(index, fill_value=False)
    return columns
