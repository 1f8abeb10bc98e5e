"""Tables of a supernode analysis: units, layers, and concentration curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from nodelens.metrics import get_metric
from nodelens.metrics.supernode import (
    concentration,
    concentration_curve,
    connectivity,
    gini,
    largest,
    overlap,
    protection,
    share_of,
    support,
)
from nodelens.network.group_layer import GroupLayer
from nodelens.network.groups import PruningGroup

from .agreement import spearman
from .controls import RANDOM, ControlSets
from .robustness import bootstrap_intervals, chance_jaccard

SHARES = (0.001, 0.01, 0.05, 0.1)
SCORES = (  # columns of the table of units that rank units
    "loss_proxy",
    "loss_proxy_factored",
    "taylor",
    "first_order",
    "curvature",
    "power",
    "largest",
    "magnitude",
    "connectivity",
    "read_connectivity",
    "scar_prot",
    "scar_conn",
)


@dataclass(frozen=True, eq=False)
class GroupConnectivity:
    """The connectivity of a group: the outputs to which its supernodes write (support), and each unit's connectivity to them."""

    group: PruningGroup
    support: Tensor
    width: int  # number of outputs
    connectivity: Tensor
    _controls: ControlSets | None = None

    @classmethod
    def of(cls, model: nn.Module, group: PruningGroup, supernodes: Tensor, topk: int, mass: float | None) -> "GroupConnectivity":
        weights = GroupLayer.of(model, group).columns
        values = connectivity(weights, supernodes, topk, mass).double()
        return cls(group, support(weights, supernodes, topk, mass), len(weights), values)

    def with_controls(self, controls: ControlSets) -> "GroupConnectivity":
        """A copy with supernodes, halo and control sets."""
        return replace(self, _controls=controls)

    @property
    def controls(self) -> ControlSets:
        assert self._controls is not None
        return self._controls


def unit_scores(group: PruningGroup, sums: Mapping[tuple[str, str], Tensor]) -> dict[str, Tensor]:
    """Scores of each unit from the sums of a pass, (units,) float64; loss_proxy_se: jackknife over groups of samples."""
    rows, positions, square = (sums[group.name, what] for what in ("rows", "positions", "square"))
    n, total = rows.sum(), square.sum(0)
    power, curvature = (sums[group.name, what] / positions for what in ("power", "slope"))
    some = rows > 0
    left = 0.5 * (total - square[some]) / (n - rows[some])[:, None]
    groups = int(some.sum())
    error = ((groups - 1) * left.var(0, correction=0)).sqrt() if groups > 1 else torch.full_like(total, torch.nan)
    return {
        "loss_proxy": 0.5 * total / n,
        "loss_proxy_se": error,
        "loss_proxy_factored": 0.5 * power * curvature,
        "power": power,
        "taylor": sums[group.name, "absolute"] / n,
        "first_order": -sums[group.name, "total"] / n,
        "curvature": curvature,
        "largest": sums[group.name, "largest"],
    }


def unit_table(
    model: nn.Module,
    layout: GroupConnectivity,
    sums: Mapping[tuple[str, str], Tensor],
    redundancy: Tensor,
    reads: Tensor,
    rule: tuple[Any, float, float],
    halo_fraction: float,
) -> pd.DataFrame:
    """One row per unit. redundancy (halo,) of halo units; reads (units,), read connectivity; rule: options of ``protection``.

    halo_fraction: share of the units in the read halo.
    """
    group, controls, conn = layout.group, layout.controls, layout.connectivity
    found = unit_scores(group, sums)
    every = torch.full((group.n,), torch.nan, dtype=torch.float64)
    every[controls.halo] = redundancy
    kept = protection(every, controls.halo, *rule)
    proxy = found["loss_proxy"]
    found |= {
        "magnitude": get_metric("group_l2")(GroupLayer.of(model, group)).sqrt(),
        "connectivity": conn,
        "read_connectivity": reads,
        "read_halo": read_halo(reads, halo_fraction),
        "supernode": torch.zeros(group.n, dtype=torch.bool).index_fill(0, controls.supernodes, True),
        "halo": torch.zeros(group.n, dtype=torch.bool).index_fill(0, controls.halo, True),
        "redundancy_to_core": every,
        "protection": kept,
        "scar_prot": proxy * kept,
        "scar_conn": proxy * ((1 - conn) + conn * kept),
    }
    index = pd.MultiIndex.from_product([[group.name], range(group.n)], names=["layer", "unit"])
    return pd.DataFrame({name: value.numpy() for name, value in found.items()}, index=index)


def layer_rows(
    layout: GroupConnectivity,
    table: pd.DataFrame,
    sums: Mapping[tuple[str, str], Tensor],
    controls: Sequence[Mapping[str, Any]],
    drawn: Sequence[Mapping[str, Any]],
    seed: int = 0,
) -> dict[str, Any]:
    """The row of a layer, from the table of its units, its controls and its resamples."""
    group, supernodes = layout.group, layout.controls.supernodes
    proxy = torch.tensor(table["loss_proxy"].to_numpy())
    row: dict[str, Any] = {
        "layer": group.name,
        "kind": group.kind,
        "units": group.n,
        "rows": int(sums[group.name, "rows"].sum()),
        "supernodes": len(supernodes),
        "halo": len(layout.controls.halo),
        "support": len(layout.support),
        "width": layout.width,
        "loss_proxy": float(proxy.sum()),
    }
    row |= {f"concentration_{100 * share:g}": concentration(proxy, share) for share in SHARES} | {"gini": gini(proxy)}
    others = {name: torch.tensor(table[name].to_numpy()) for name in ("largest", "power", "magnitude")}
    for other, values in others.items():
        row[f"jaccard_{other}"] = overlap(supernodes, largest(values, len(supernodes)))
        row[f"spearman_{other}"] = spearman(proxy, values)
    row |= bootstrap_intervals(others, sums[group.name, "square"], sums[group.name, "rows"], supernodes, seed)
    for found in controls:
        if found["quantity"] == "redundancy":
            prefix = "random" if found["control"] == RANDOM else "matched"
            row |= {"redundancy": found["halo"], f"redundancy_{prefix}": found["other"], f"{prefix}_p": found["p"]}
    row["jaccard_resampled"] = float(np.mean([draw["jaccard"] for draw in drawn])) if drawn else np.nan
    row["spearman_resampled"] = float(np.mean([draw["spearman"] for draw in drawn])) if drawn else np.nan
    return row | {"jaccard_by_chance": chance_jaccard(group.n, len(supernodes))}


def concentration_table(name: str, proxy: pd.Series) -> pd.DataFrame:
    """The curve of a layer: share of its units, largest first, and their share of its loss proxy."""
    share, held = concentration_curve(torch.tensor(proxy.to_numpy()))
    return pd.DataFrame({"layer": name, "share": share.numpy(), "held": held.numpy()})


def read_halo(reads: Tensor, fraction: float) -> Tensor:
    """Which units have the largest read connectivity, a share of all, (units,) bool; none where it is not known."""
    members = torch.zeros(len(reads), dtype=torch.bool)
    known = reads.isfinite()
    if not known.any():
        return members
    return members.index_fill(0, largest(reads.where(known, -torch.inf), share_of(len(reads), fraction)), True)


def read_connectivity(model: nn.Module, layouts: Sequence[GroupConnectivity]) -> dict[str, Tensor]:
    """{group: share of a unit's incoming weight from outputs to which the supernodes of the previous FFN write, (units,)}.

    Formula: sum over h in H of |w_j[h]| / sum over all h; w_j: incoming weights of unit j (gate and up), H: support of that FFN
    NaN:     a group without a previous FFN of the same width
    Source:  2604.23475
    """
    found, before = {}, None
    for layout in layouts:
        found[layout.group.name] = torch.full((layout.group.n,), torch.nan, dtype=torch.float64)
        if layout.group.kind != "ffn":
            continue
        slices = GroupLayer.of(model, layout.group).pieces("producer")
        if before is not None and all(piece.of(model).shape[1 - piece.dim] == before.width for piece in slices):
            parts = torch.cat(
                [piece.by_unit(model).double().abs().reshape(layout.group.n, -1, before.width) for piece in slices], 1
            ).cpu()
            found[layout.group.name] = parts[..., before.support].sum((1, 2)) / parts.sum((1, 2))
        before = layout
    return found
