"""Every metric of units of the catalogue, measured where a model and its data allow it."""

from collections.abc import Collection, Iterable
from typing import Any

import pandas as pd
from torch import nn

from nodelens.analysis.ablation.ablate import Setting
from nodelens.engine.analyze import analyze as measure_units
from nodelens.engine.driver import first_of_data
from nodelens.metrics import Metric, get_metric, list_metrics
from nodelens.network.batch_forms import few
from nodelens.statistics.processes import first_of

_FEW = 8  # samples
_REFUSED = (ValueError, TypeError, MemoryError, RuntimeError)


def catalogue(known: Collection[str] = ()) -> dict[str, Metric]:
    """All metrics of units, once each, without those whose name is known."""
    found: dict[str, Metric] = {}
    for name in sorted(list_metrics(), key=lambda name: (get_metric(name).names[0] != name, name)):
        metric = get_metric(name)
        if metric.shape == "unit" and metric not in found.values() and not {name, *metric.names} & {*known}:
            found[name] = metric
    return found


def all_scores(
    model: nn.Module, data: Iterable[Any], setting: Setting, known: Collection[str], seed: int, objective: dict[str, Any]
) -> tuple[pd.DataFrame, list[dict[str, str]]]:
    """One column per metric of the catalogue, and those that the model or the data refuse, with the reason.

    Which are refused is seen on a few samples; the others are measured in one call. known: columns that are there already.
    """
    layers = setting.layers
    own, _ = first_of_data(data, setting.objective)
    first = first_of(None if own is None else few(own, _FEW))  # the same samples in every process, also in one without data
    options = {"seed": seed, "groups": 1, **objective}
    accepted, missing = dict[str, Metric](), []
    for name, metric in catalogue(known).items():
        try:
            measure_units(model, [first], {name: metric}, layers, **options)
            accepted[name] = metric
        except _REFUSED as error:
            missing.append({"layer": "all layers", "what": name, "reason": str(error).splitlines()[0]})
    if not accepted:
        return pd.DataFrame(index=pd.MultiIndex.from_tuples([], names=["layer", "unit"])), missing
    units = measure_units(model, data, accepted, layers, **options).units
    return units[[name for name in accepted if name in units]], missing
