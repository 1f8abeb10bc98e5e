"""The tables of a pruning run: one row per cell of the sweep, one row per pruning group."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from torch import nn

from nodelens.network.groups import PruningGroups
from nodelens.pruning.cost import Cost

_SETTINGS = ("name", "status", "criterion", "allocation", "compensate", "mode", "amount", "seed", "budget", "schedule")
_ACHIEVED = (
    "units",
    "units_removed",
    "params",
    "dense_params",
    "params_share",
    "macs",
    "dense_macs",
    "macs_share",
    "budget_error",
    "smallest_kept",
    "exact",
)
_STRINGS = {*_SETTINGS, "plan", "carried_out_as", "error"} - {"amount", "seed"}
_INTEGERS = {"seed", "units", "units_removed", "params", "dense_params", "macs", "dense_macs", "smallest_kept"}


def sweep_table(rows: Iterable[Mapping[str, Any]], dense: Mapping[str, Any]) -> pd.DataFrame:
    """One row per cell, with fixed dtypes.

    accuracy, loss, ece: of the finished model on the test set, ``accuracy_se`` the standard error; val_pruned_*: on validation
    data before fine-tuning, val_*: after it; dense_*, val_dense_*: of the dense model. latency_batchN_ms, dense_latency_batchN_ms:
    median latency in ms at batch size N, with quartiles (q25, q75). Columns ending in _s, and seconds, are durations.
    carried_out_as: the cell whose pruned model this cell shares.
    """
    cells = []
    for row in rows:
        about, result, clock = row.get("about") or {}, row.get("result") or {}, row.get("clock") or {}
        cell = {k: row.get(k) for k in _SETTINGS} | {k: about.get(k) for k in _ACHIEVED}
        cell |= {k: v for k, v in result.items() if k != "samples"} | clock
        cell |= {"seconds": row.get("seconds"), "plan": row.get("plan"), "carried_out_as": row.get("carried_out_as")}
        cells.append(cell | {"error": row.get("error")})
    table = pd.DataFrame(cells)
    for column in table:
        if column in _STRINGS:
            table[column] = table[column].astype("string")
        elif column == "exact":
            table[column] = table[column].astype("boolean")
        elif column in _INTEGERS:
            table[column] = table[column].astype("Int64")
        else:
            table[column] = table[column].astype(float)
    return table.assign(**{k: float(v) for k, v in dense.items() if k != "samples" and not isinstance(v, dict)})


def groups_table(model: nn.Module, groups: PruningGroups, cost: Cost) -> pd.DataFrame:
    """One row per group: kind, units, the cost of its first removed unit, whether slicing equals masking, coupled layers."""
    rows = []
    for group in groups:
        one = {group.name: group.n - 1}
        rows.append(
            {
                "layer": group.name,
                "kind": group.kind,
                "units": group.n,
                "params_per_unit": cost.params() - cost.params(one),
                "macs_per_unit": cost.macs() - cost.macs(one),
                "exact": group.exact,
                "multiple": group.multiple,
                "coupled": group.describe(),
            }
        )
    return pd.DataFrame(rows).set_index("layer")
