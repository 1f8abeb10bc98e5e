"""The tables of a pruning run: a row a cell, a row a group, a row a unit."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from torch import nn

from nodelens.network.groups import PruningGroups
from nodelens.pruning.cost import Cost

_ASKED = ("name", "status", "criterion", "allocation", "compensate", "mode", "amount", "seed", "budget", "schedule")
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
_WORDS = {*_ASKED, "plan", "carried_out_as", "error"} - {"amount", "seed"}


def sweep_table(rows: Iterable[Mapping[str, Any]], dense: Mapping[str, Any]) -> pd.DataFrame:
    """A row a cell, dtypes fixed.

    accuracy, loss, ece: of the finished model on the test set, ``accuracy_se`` its standard error; val_pruned_*: on validation
    data before recovery, val_*: after it; dense_*, val_dense_*: of the dense model. latency_ms and dense_latency_ms are medians at
    batch 1 with their quartiles, and others by ``batchN_``; columns that end in _s, and seconds, are the clock's.
    """
    found = []
    for row in rows:
        about, result, clock = row.get("about") or {}, row.get("result") or {}, row.get("clock") or {}
        cell = {k: row.get(k) for k in _ASKED} | {k: about.get(k) for k in _ACHIEVED}
        cell |= {k: v for k, v in result.items() if k != "samples"} | clock
        cell |= {"seconds": row.get("seconds"), "plan": row.get("plan"), "carried_out_as": row.get("carried_out_as")}
        found.append(cell | {"error": row.get("error")})
    table = pd.DataFrame(found)
    words = {
        "name",
        "status",
        "criterion",
        "allocation",
        "compensate",
        "mode",
        "budget",
        "schedule",
        "plan",
        "carried_out_as",
        "error",
    }
    for column in table:
        if column in words:
            table[column] = table[column].astype("string")
        elif column == "exact":
            table[column] = table[column].astype("boolean")
        elif column in ("seed", "units", "units_removed", "params", "dense_params", "macs", "dense_macs", "smallest_kept"):
            table[column] = table[column].astype("Int64")
        else:
            table[column] = table[column].astype(float)
    return table.assign(**{k: float(v) for k, v in dense.items() if k != "samples" and not isinstance(v, dict)})


def groups_table(model: nn.Module, groups: PruningGroups, cost: Cost) -> pd.DataFrame:
    """A row a group: kind, units, what one unit costs when it goes first, whether a slice equals a mask, what is coupled."""
    rows = []
    for group in groups:
        one = {group.name: group.n - 1}
        rows.append(
            {
                "layer": group.name,
                "kind": group.kind,
                "units": group.n,
                "params_a_unit": cost.params() - cost.params(one),
                "macs_a_unit": cost.macs() - cost.macs(one),
                "exact": group.exact,
                "multiple": group.multiple,
                "coupled": group.describe(),
            }
        )
    return pd.DataFrame(rows).set_index("layer")
