"""Given scores: a table, tensors by layer or group, or a function of a group, as one column of a score table."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from nodelens.engine.layout import REDUCTIONS, Reduce
from nodelens.messages import nearest
from nodelens.metrics import Metric
from nodelens.network.groups import PruningGroup
from nodelens.results.result import values_of

from .criterion import Criterion

GIVEN = "given"  # the column
Scores: TypeAlias = pd.DataFrame | pd.Series | Mapping[str, Tensor] | Callable[[PruningGroup], Tensor]


def is_given(criterion: Any) -> TypeGuard[Scores]:
    """Whether a criterion is scores, instead of a name or a description of what is measured."""
    if isinstance(criterion, (pd.DataFrame, pd.Series)):
        return True
    if isinstance(criterion, Mapping):
        return any(isinstance(value, (Tensor, np.ndarray, pd.Series, list, tuple)) for value in criterion.values())
    return callable(criterion) and not isinstance(criterion, (Metric, Criterion, type))


def given_scores(scores: Scores, groups: Iterable[PruningGroup], reduce: Reduce = "sum") -> pd.DataFrame:
    """One row per unit, index (group, unit), column ``given``.

    scores: a table with index (group or layer, unit), or these columns, and a column ``score`` or one numeric column; {group or
    layer: tensor (units,)}; or a function of a group. A layer's scores are those of the group whose units it makes; ``reduce``
    combines several layers of a group, which may have the name of its first. Entries for other layers are not read.

    Raises ValueError for a group without scores, or with another number of them than it has units.
    """
    if isinstance(scores, (pd.DataFrame, pd.Series)):
        scores = _by_name(scores)
    if isinstance(scores, Mapping):
        parts = {group.name: _of(group, scores, reduce) for group in groups}
    else:
        parts = {group.name: _checked(scores(group), group, "the function") for group in groups}
    index = pd.MultiIndex.from_tuples(
        [(name, u) for name, part in parts.items() for u in range(len(part))], names=["group", "unit"]
    )
    return pd.DataFrame({GIVEN: torch.cat(list(parts.values())).numpy()}, index=index)


def _of(group: PruningGroup, scores: Mapping[str, Any], reduce: Reduce) -> Tensor:
    layers = list(dict.fromkeys(piece.module for piece in group.by_role("producer")))
    if group.name in scores and group.name not in layers:
        return _checked(scores[group.name], group, repr(group.name))
    found = [_checked(scores[layer], group, repr(layer)) for layer in layers if layer in scores]
    if not found:
        made = f" (made by {', '.join(layers[:3])})" if layers and layers != [group.name] else ""
        raise ValueError(
            f"criterion has no scores for group {group.name!r}{made}.{nearest(group.name, map(str, scores))} Give them by the name "
            "of the group or of a layer, or leave the group out with freeze="
        )
    return REDUCTIONS[reduce](torch.stack(found, -1))


def _checked(values: Any, group: PruningGroup, what: str) -> Tensor:
    """Scores of a group, (units,) float64 on the CPU."""
    if isinstance(values, pd.Series):
        units = list(values.index)
        if sorted(units, key=str) != sorted(range(group.n), key=str):
            raise ValueError(f"criterion: {what} has {len(units)} units, group {group.name!r} has {group.n}, numbered from 0")
        values = values.reindex(range(group.n))
    found = values.detach().cpu() if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    if found.is_complex() or tuple(found.shape) != (group.n,):
        raise ValueError(
            f"criterion: {what} gives scores of the shape {tuple(found.shape)}, group {group.name!r} has {group.n} units"
        )
    return found.double()


def _by_name(table: pd.DataFrame | pd.Series) -> dict[str, pd.Series]:
    """{group or layer: scores by unit} of a table."""
    frame = table.to_frame("score") if isinstance(table, pd.Series) else table
    names = next((name for name in ("group", "layer") if name in frame), None)
    if names is not None and "unit" in frame:
        frame = frame.set_index([names, "unit"])
    if frame.index.nlevels != 2:
        raise ValueError("criterion is a table without units: its index is (layer, unit) or (group, unit), or it has these columns")
    columns = ["score"] if "score" in frame else values_of(frame)
    if len(columns) != 1:
        raise ValueError(
            f"criterion is a table with the columns {', '.join(map(str, frame))}: give one, as table[['rq']], or call it score"
        )
    return {str(name): part.droplevel(0) for name, part in frame[columns[0]].groupby(level=0, sort=False)}
