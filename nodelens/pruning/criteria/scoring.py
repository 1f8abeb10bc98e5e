"""Scores of the units of pruning groups: the metrics that the criteria read, measured at the groups."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from torch import nn

from nodelens.engine.analyze import analyze
from nodelens.engine.layout import Reduce
from nodelens.metrics import Metric, get_metric
from nodelens.network.groups import PruningGroup
from nodelens.network.targets import summed_loss

from .criterion import RANDOM, Criterion


def columns_of(criteria: Iterable[Criterion], given: Mapping[str, Metric | None] | None = None) -> dict[str, Metric]:
    """What the criteria read, by column: a metric that is given, else the one of that name.

    Raises ValueError for a name that no metric has, or a metric that gives no value per unit.
    """
    found: dict[str, Metric] = {}
    for criterion in criteria:
        for column in criterion.columns:
            if column == RANDOM or column in found:
                continue
            metric = (given or {}).get(column) or get_metric(column)
            if metric.shape != "unit":
                raise ValueError(f"criterion {criterion.name!r} ranks units; {column} gives one value per {metric.shape}")
            found[column] = metric
    return found


def score_table(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    columns: Mapping[str, Metric],
    data: Iterable[Any] | None = None,
    /,  # options of nl.analyze include ``groups``
    *,
    reduce: Reduce = "sum",
    seed: int = 0,
    loss: Any = summed_loss,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    **options: Any,
) -> pd.DataFrame:
    """One row per unit, index (group, unit), and one column per metric: what ``nl.analyze`` finds at the groups.

    ``reduce`` puts the values at several places of a unit together (a head's span, several layers that make it); options go to
    ``nl.analyze``. Raises ValueError where data are missing, or a unit cannot be seen.
    """
    if not columns:
        index = pd.MultiIndex.from_tuples([(g.name, u) for g in groups for u in range(g.n)], names=["group", "unit"])
        return pd.DataFrame(index=index)
    keywords = {"reduce": reduce, "seed": seed, "loss": loss, "progress": progress, **options}
    units = analyze(model, data, columns, list(groups), **keywords).units
    return units[list(columns)].rename_axis(index=["group", "unit"])
