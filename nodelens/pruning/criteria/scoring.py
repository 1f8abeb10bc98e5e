"""The score table: the metrics that criteria read, measured at pruning groups."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from torch import nn

from nodelens.engine.analyze import measure
from nodelens.engine.layout import Reduce
from nodelens.metrics import Metric, get_metric
from nodelens.network.groups import PruningGroup

from .criterion import RANDOM, Criterion


def columns_of(criteria: Iterable[Criterion], given: Mapping[str, Metric | None] | None = None) -> dict[str, Metric]:
    """{column: metric} that the criteria read: the metric given for the column, else the metric of that name.

    Raises ValueError for an unknown name, or a metric that does not give one value per unit.
    """
    found: dict[str, Metric] = {}
    for criterion in criteria:
        for column in criterion.columns:
            if column == RANDOM or column in found:
                continue
            metric = (given or {}).get(column) or get_metric(column)
            if metric.shape != "unit":
                names = {"edge": "pair of layers", "pair": "pair of units", "input": "input of a unit"}
                per = names.get(metric.shape, metric.shape)
                raise ValueError(
                    f"criterion {criterion.name!r} ranks units; {column} gives one value per {per}: choose a metric of units"
                )
            found[column] = metric
    return found


def score_table(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    columns: Mapping[str, Metric],
    data: Iterable[Any] | None = None,
    /,  # positional, because ``groups`` is also an option of nl.analyze
    *,
    reduce: Reduce = "sum",
    seed: int = 0,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    **options: Any,
) -> pd.DataFrame:
    """One row per unit, index (group, unit), and one column per metric: the result of ``nl.analyze`` for the groups.

    ``reduce`` combines a unit's values at several places (a head's channels, several layers that make it); options go to
    ``nl.analyze``. Raises ValueError if data are missing, or if no layer captures the units of a group.
    """
    if not columns:
        index = pd.MultiIndex.from_tuples([(g.name, u) for g in groups for u in range(g.n)], names=["group", "unit"])
        return pd.DataFrame(index=index)
    keywords = {"reduce": reduce, "seed": seed, "progress": progress, **options}
    units = measure(model, data, columns, list(groups), **keywords).units
    return units[list(columns)].rename_axis(index=["group", "unit"])
