"""Tables of modules: one row per layer and association, and one per pair of partitions of the same units."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from nodelens.statistics.seeding import seed_of

from .comparison import (
    adj_spearman,
    alignment_score,
    alignment_significance,
    ami,
    ari,
    element_similarity,
    transfer_modularity,
    variation_of_information,
)

MODULES = (
    *("layer", "association", "q", "units", "dead", "modules", "soft_number", "components"),
    *("q_null", "q_null_std", "z", "p", "null_model"),
)
OF_ASSOCIATIONS = ("transfer", "transfer_back", "transfer_normalized", "transfer_normalized_back", "adj_spearman")
SIMILARITIES = ("alignment", "alignment_null", "alignment_z", "alignment_p", "ami", "ari", "vi", "element_sim", *OF_ASSOCIATIONS)


@dataclass(frozen=True)
class Partitioned:
    """Labels of the units of a layer, and the association that they were found in, where it is known.

    names: what tells the partition from others, such as layer and association
    """

    names: dict[str, str]
    labels: np.ndarray
    association: np.ndarray | None = None


def comparison_table(
    pairs: Sequence[tuple[Partitioned, Partitioned]], key: str, fixed: Sequence[str], **options: Any
) -> pd.DataFrame:
    """One row per pair: what both have in common, the names of the two under ``key``, and how alike they are."""
    rows = []
    for a, b in pairs:
        names = {name: a.names[name] for name in fixed} | {f"{key}_a": a.names[key], f"{key}_b": b.names[key]}
        rows.append(names | similarity(a, b, **options))
    return pd.DataFrame(rows, columns=[*fixed, f"{key}_a", f"{key}_b", *SIMILARITIES])


def similarity(
    a: Partitioned, b: Partitioned, *, absolute: bool = True, gamma: float = 1.0, shuffles: int = 1000, seed: int = 0
) -> dict[str, float]:
    """How alike two partitions are, and their associations. NaN for what reads an association that is not known."""
    null = alignment_significance(a.labels, b.labels, shuffles, seed_of(seed, *a.names.values(), *b.names.values()))
    found = {
        "alignment": alignment_score(a.labels, b.labels),
        "alignment_null": null.mean,
        "alignment_z": null.z,
        "alignment_p": null.p,
        "ami": ami(a.labels, b.labels),
        "ari": ari(a.labels, b.labels),
        "vi": variation_of_information(a.labels, b.labels),
        "element_sim": element_similarity(a.labels, b.labels),
    }
    for one, other, suffix in ((a, b, ""), (b, a, "_back")):
        if one.association is not None:
            found[f"transfer{suffix}"] = transfer_modularity(one.association, other.labels, absolute=absolute, gamma=gamma)
            own = transfer_modularity(one.association, other.labels, one.labels, absolute=absolute, gamma=gamma)
            found[f"transfer_normalized{suffix}"] = own
    if a.association is not None and b.association is not None:
        found["adj_spearman"] = adj_spearman(a.association, b.association, absolute)
    return {name: found.get(name, float("nan")) for name in SIMILARITIES}


def within(parts: Sequence[Partitioned], key: str) -> list[tuple[Partitioned, Partitioned]]:
    """All pairs that differ in one name only."""

    def others(part: Partitioned) -> dict[str, str]:
        return {name: value for name, value in part.names.items() if name != key}

    return [(a, b) for a, b in combinations(parts, 2) if others(a) == others(b)]
