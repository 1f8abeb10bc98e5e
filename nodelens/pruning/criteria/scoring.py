"""Scores of a group's units: published criteria on the group itself, metrics of the catalogue joined to it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn

from nodelens.engine.analyze import analyze
from nodelens.metrics import Metric, get_metric
from nodelens.network.groups import GroupSlice, PruningGroup
from nodelens.network.targets import summed_loss

from .baselines import Baseline, baseline, baseline_scores
from .baselines import names as baseline_names
from .criterion import RANDOM, Criterion

Reduce = Literal["sum", "mean", "max", "prod", "first"]
_REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(1),
    "mean": lambda x: x.mean(1),
    "max": lambda x: x.amax(1),
    "prod": lambda x: x.prod(1),
    "first": lambda x: x[:, 0],
}
_AT_CONSUMERS = {"output", "output*grad", "grad", "output*grad/tokens", "grad/tokens"}  # ports that a reader's input has too


def columns_of(criteria: Iterable[Criterion], given: Mapping[str, Any] | None = None) -> dict[str, Metric | Baseline]:
    """What the criteria read, by column: an object that is given, a published criterion, else a metric of the catalogue.

    Raises ValueError for a name that is neither, or a metric that gives no value a unit.
    """
    found: dict[str, Metric | Baseline] = {}
    for criterion in criteria:
        for column in criterion.columns:
            if column == RANDOM or column in found:
                continue
            term = (given or {}).get(column)
            if term is None:
                term = baseline(column) if column in baseline_names() else get_metric(column)
            if isinstance(term, Metric) and term.shape != "unit":
                raise ValueError(f"criterion {criterion.name!r} ranks units; {column} gives a value a {term.shape}")
            found[column] = term
    return found


def score_table(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    columns: Mapping[str, Metric | Baseline],
    data: Iterable[Any] | None = None,
    /,  # options of nl.analyze include ``groups``
    *,
    reduce: Reduce = "sum",
    seed: int = 0,
    loss: Any = summed_loss,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    **options: Any,
) -> pd.DataFrame:
    """A row a unit, index (group, unit), a column a term.

    A metric of what passes is read where the units are consumed; one that reads weights or inputs at what makes them. Where a
    unit has several places there (a head's span, several layers that make it) the values are put together by ``reduce``.
    options go to ``nl.analyze``. Raises ValueError where data are missing, or a unit cannot be seen.
    """
    if reduce not in _REDUCE:
        raise ValueError(f"reduce is {reduce!r}; it is {', '.join(_REDUCE)}")
    own = {name: term for name, term in columns.items() if isinstance(term, Baseline)}
    metrics = {name: term for name, term in columns.items() if isinstance(term, Metric)}
    index = pd.MultiIndex.from_tuples([(a.name, u) for a in groups for u in range(a.n)], names=["group", "unit"])
    table = pd.DataFrame(index=index)
    if own:
        found = baseline_scores(model, groups, own, data, seed=seed, loss=loss, progress=progress)
        table = table.join(found)
    for read in (True, False):
        chosen = {name: metric for name, metric in metrics.items() if at_consumers(metric) == read}
        if chosen:
            table = table.join(
                _joined(model, groups, chosen, data, read, reduce, seed=seed, loss=loss, progress=progress, **options)
            )
    return table[list(columns)]


def at_consumers(metric: Metric) -> bool:
    """Whether a metric is read at the input of what reads the units, not at the output of what makes them."""
    return not metric.weighted and all(need.port in _AT_CONSUMERS and need.target != "input" for need in metric.needs().values())


def _joined(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    metrics: dict[str, Metric],
    data: Any,
    read: bool,
    reduce: Reduce,
    /,
    **options: Any,
) -> pd.DataFrame:
    """The metrics' values a unit, from one pass over their layers."""
    if data is None:
        raise ValueError(f"{', '.join(metrics)} are measured on data: give data=, or a criterion of weights such as magnitude")
    places = {group.name: _places(model, group, read, next(iter(metrics))) for group in groups}
    layers = list(dict.fromkeys(layer for found in places.values() for layer, _ in found))
    units = analyze(model, data, metrics, layers, **options).units
    by_layer = {layer: torch.tensor(rows[list(metrics)].to_numpy(float)) for layer, rows in units.groupby(level="layer")}
    parts = []
    for group in groups:
        members = torch.cat([by_layer[layer][index] for layer, index in places[group.name]], 1)  # (units, members, metrics)
        values = _REDUCE[reduce](members)
        rows = pd.MultiIndex.from_tuples([(group.name, u) for u in range(group.n)], names=["group", "unit"])
        parts.append(pd.DataFrame(values.numpy(), index=rows, columns=list(metrics)))
    return pd.concat(parts)


def _places(model: nn.Module, group: PruningGroup, read: bool, metric: str) -> list[tuple[str, Tensor]]:
    """Layers that show a group, with the places of its units there."""
    if group.router is not None:
        raise ValueError(
            f"{metric} is one of hidden units; group {group.name!r} has whole experts: score them by taylor, loss_proxy, "
            "router_load, weights (group_l2, magnitude) or at random, or prune their channels instead, scope=moe_ffn"
        )
    slices = group.by_role("consumer") if read else [piece for piece in group.by_role("producer") if piece.tensor == "weight"]
    hidden = read and all(piece.tensor == "down_proj" for piece in slices)  # of an expert, over the tokens that go to it
    if not slices or not (group.gated or hidden):
        raise ValueError(
            f"{metric} cannot see the units of {group.name!r}: its experts lie in one tensor; score it by weights (group_l2, "
            "magnitude) or by their gradients (llm_pruner), or leave it out with freeze="
        )
    return [(_shown(model, piece, read), piece.places if read else piece.index) for piece in slices]


def _shown(model: nn.Module, piece: GroupSlice, read: bool) -> str:
    """The name of the layer that shows the units of a piece."""
    if piece.entry is not None:
        return f"{piece.module}[{piece.entry}].hidden"
    return (piece.module or type(model).__name__) + (".input" if read else "")
