"""Tables of loss-critical channels: a row a unit, a row a layer, a curve."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from nodelens.metrics import get_metric
from nodelens.metrics.core_and_halo import (
    concentration,
    concentration_curve,
    connectivity,
    gini,
    largest,
    overlap,
    protection,
    support,
)
from nodelens.network.group_layer import GroupLayer
from nodelens.network.groups import PruningGroup

from .agreement import spearman
from .controls import Compared
from .robustness import by_chance

SHARES = (0.001, 0.01, 0.05, 0.1)
SCORES = (  # columns of the table of units that say which unit matters more
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
class Layout:
    """A group with what its weights and its core say: where the core writes (ids of outputs), each unit's part in that."""

    group: PruningGroup
    support: Tensor
    width: int  # outputs
    connectivity: Tensor
    _compared: Compared | None = None

    @classmethod
    def of(cls, model: nn.Module, group: PruningGroup, core: Tensor, topk: int, mass: float | None) -> "Layout":
        weights = GroupLayer.of(model, group).columns
        return cls(group, support(weights, core, topk, mass), len(weights), connectivity(weights, core, topk, mass).double())

    def surrounded(self, compared: Compared) -> "Layout":
        """The same with core and halo, and what these are compared with."""
        return replace(self, _compared=compared)

    @property
    def compared(self) -> Compared:
        assert self._compared is not None
        return self._compared


def measured(group: PruningGroup, sums: Mapping[tuple[str, str], Tensor]) -> dict[str, Tensor]:
    """Scores a unit of the sums of a pass, (units,) float64; loss_proxy_se is the jackknife's over groups of samples."""
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
    layout: Layout,
    sums: Mapping[tuple[str, str], Tensor],
    redundancy: Tensor,
    reads: Tensor,
    rule: tuple[Any, float, float],
) -> pd.DataFrame:
    """A row a unit. redundancy (halo,): of its members; reads (units,); rule: of protection, its floor and power."""
    group, compared, conn = layout.group, layout.compared, layout.connectivity
    found = measured(group, sums)
    every = torch.full((group.n,), torch.nan, dtype=torch.float64)
    every[compared.halo] = redundancy
    kept = protection(every, compared.halo, *rule)
    proxy = found["loss_proxy"]
    found |= {
        "magnitude": get_metric("group_l2")(GroupLayer.of(model, group)).sqrt(),
        "connectivity": conn,
        "read_connectivity": reads,
        "supernode": torch.zeros(group.n, dtype=torch.bool).index_fill(0, compared.core, True),
        "halo": torch.zeros(group.n, dtype=torch.bool).index_fill(0, compared.halo, True),
        "redundancy_to_core": every,
        "protection": kept,
        "scar_prot": proxy * kept,
        "scar_conn": proxy * ((1 - conn) + conn * kept),
    }
    index = pd.MultiIndex.from_product([[group.name], range(group.n)], names=["layer", "unit"])
    return pd.DataFrame({name: value.numpy() for name, value in found.items()}, index=index)


def layer_rows(
    layout: Layout,
    table: pd.DataFrame,
    sums: Mapping[tuple[str, str], Tensor],
    controls: Sequence[Mapping[str, Any]],
    drawn: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The row of a layer, of its units' table, its controls and its resamples."""
    group, core = layout.group, layout.compared.core
    proxy = torch.tensor(table["loss_proxy"].to_numpy())
    row: dict[str, Any] = {
        "layer": group.name,
        "kind": group.kind,
        "units": group.n,
        "rows": int(sums[group.name, "rows"].sum()),
        "supernodes": len(core),
        "halo": len(layout.compared.halo),
        "support": len(layout.support),
        "width": layout.width,
        "loss_proxy": float(proxy.sum()),
    }
    row |= {f"concentration_{100 * share:g}": concentration(proxy, share) for share in SHARES} | {"gini": gini(proxy)}
    for other in ("largest", "power", "magnitude"):
        values = torch.tensor(table[other].to_numpy())
        row[f"jaccard_{other}"] = overlap(core, largest(values, len(core)))
        row[f"spearman_{other}"] = spearman(proxy, values)
    for found in controls:
        if found["quantity"] == "redundancy":
            prefix = "random" if found["control"] == "random core" else "matched"
            row |= {"redundancy": found["halo"], f"redundancy_{prefix}": found["other"], f"{prefix}_p": found["p"]}
    row["jaccard_resampled"] = float(np.mean([draw["jaccard"] for draw in drawn])) if drawn else np.nan
    row["spearman_resampled"] = float(np.mean([draw["spearman"] for draw in drawn])) if drawn else np.nan
    return row | {"jaccard_by_chance": by_chance(group.n, len(core))}


def concentration_table(name: str, proxy: pd.Series) -> pd.DataFrame:
    """The curve of a layer: share of its units, and of its loss proxy that the largest of them hold."""
    share, held = concentration_curve(torch.tensor(proxy.to_numpy()))
    return pd.DataFrame({"layer": name, "share": share.numpy(), "held": held.numpy()})


def read_by_next(model: nn.Module, layouts: Sequence[Layout]) -> dict[str, Tensor]:
    """{group: the share of what its units read that the core of the FFN before writes, (units,)}; NaN where there is none.

    Formula: sum over h in H of |w_j[h]| / sum over all h, w_j all weights that make unit j (gate and up), H the support before it
    Source: 2604.23475
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
