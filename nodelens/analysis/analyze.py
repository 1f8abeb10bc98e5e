"""``nl.analyze``: measures the units of a model, and runs analyses of what was measured."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nodelens.engine.analyze import analyze as measure_units
from nodelens.engine.options import AnalyzeOptions, check_kind
from nodelens.engine.plan import Plan
from nodelens.engine.request import Layers, Metrics, as_metrics
from nodelens.messages import keywords_of
from nodelens.network.arguments import check_arguments
from nodelens.network.eval_mode import uncompiled
from nodelens.network.sharded import check_whole
from nodelens.results.findings import Findings
from nodelens.results.result import Result

from .base import Analysis
from .registry import Analyses, as_analyses, with_metrics


def analyze(
    model: nn.Module,
    data: Iterable[Any] | None,
    metrics: Metrics = "default",
    layers: Layers = "*",
    *,
    analysis: Analyses = (),
    evaluation: Iterable[Any] | None = None,
    initial: nn.Module | Mapping[str, Tensor] | None = None,
    options: AnalyzeOptions | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    **named: Any,
) -> Result:
    """Measures the units of a model in one pass over the data, in eval mode, on the device of its parameters.

    data:       batches, each a tensor, an (x, y) pair or a dict (input_ids, attention_mask, labels, ids). Under a process group,
                each process passes its own share. None is allowed if all metrics read weights only
    metrics:    a name, a set by name such as forward, metric objects, a list of these, or {column: metric}
    layers:     a name, a glob, a role, a list of them, or pruning groups
    analysis:   further analyses: a name such as modularity, an analysis object, a list of them, or {name: analysis}. What they
                need is measured in the same pass; their results are in ``result.analyses``, their columns in ``result.units``
    evaluation: batches on which an analysis measures losses. None: those of data
    initial:    the network before training, or its state dict, for metrics of the weights' change
    options:    ``AnalyzeOptions``; each of its fields can also be passed by name, as in ``groups=16``, which then counts
    on_plan:    called with the plan before the data are read
    progress:   wraps the batches of each pass, for a progress bar

    Calls from several threads run one after the other.

    Returns the tables of units, layers and layer pairs. Raises ValueError for names without a match, data that do not fit the model
    and missing labels; MemoryError beyond the budget; TypeError for an unknown option.
    """
    model = uncompiled(model)
    check_kind("nl.analyze", options, AnalyzeOptions)
    check_arguments("nl.analyze", model, data, sharded=True)
    settings = (options or AnalyzeOptions()).with_named(named, "nl.analyze", keywords_of(analyze))
    analyses = as_analyses(analysis)
    if analyses:
        check_whole(f"analysis {', '.join(analyses)}", model)
    if analyses and data is not None and iter(data) is data:
        names = ", ".join(analyses)
        raise ValueError(f"{names} may read the data again, but they are an iterator: give a loader or a list of batches")
    every = with_metrics(as_metrics(metrics), analyses)
    if not every and not analyses:
        raise ValueError(
            "metrics is empty: give names, such as ['rq'], or a set, such as 'default', or ask for an analysis, analysis="
        )
    result = measure_units(model, data, every, layers, initial=initial, options=settings, on_plan=on_plan, progress=progress)
    given = {"task": settings.task, "output": settings.output, "loss": settings.loss}
    objective: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    again = () if data is None else data
    for name, each in analyses.items():
        kept = kept_in(each, settings.save_to, name, settings.save_minutes)
        found = each(model, again, result=result, evaluation=evaluation, seed=settings.seed, progress=progress, **kept, **objective)
        add_analysis(result, name, found)
    return result


def kept_in(analysis: Any, folder: str | Path | None, name: str, minutes: float) -> dict[str, Any]:
    """Keywords that let an analysis keep what it has done in a subfolder of its name; none for an object of another class."""
    if folder is None or not isinstance(analysis, Analysis):
        return {}
    return {"save_to": Path(folder) / name, "save_minutes": minutes}


def add_analysis(result: Result, name: str, found: Any) -> None:
    """Adds what an analysis found to a result: its columns of units, its matrices, and the whole under its name.

    Raises ValueError for a column that the result has already.
    """
    result.analyses[name] = found
    result.metadata["analyses"] = list(result.analyses)
    if not isinstance(found, Findings):
        return
    if found.units is not None:
        if taken := [column for column in found.units if column in result.units]:
            raise ValueError(f"analysis {name!r} has the column {taken[0]!r}, which the table of units has already: name it anew")
        result.units = result.units.join(found.units)
    result.matrices |= found.matrices


def without_analyses(result: Result) -> Result:
    """A result as it was before ``add_analysis``: without analyses, their columns and their matrices."""
    every = [found for found in result.analyses.values() if isinstance(found, Findings)]
    columns = [column for found in every if found.units is not None for column in found.units]
    taken = {key for found in every for key in found.matrices}
    return replace(
        result,
        units=result.units.drop(columns=columns),
        matrices={key: matrix for key, matrix in result.matrices.items() if key not in taken},
        metadata=result.metadata | {"analyses": []},
        analyses={},
    )
