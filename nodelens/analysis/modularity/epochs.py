"""Modules over training: those of an epoch under the names of the modules before, and how many units stay in them."""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pandas as pd

from nodelens.results.findings import Findings

from .columns import labels_of
from .comparison import matched
from .tables import OF_ASSOCIATIONS, Partitioned, comparison_table


def follow_epochs(found: Mapping[int, Findings], shuffles: int = 1000, seed: int = 0) -> Findings:
    """Follows modules from epoch to epoch.

    found:    {epoch: what ``ModularityAnalysis`` found after it}
    shuffles: number of shuffles of units, for the p of an alignment

    Returns the tables ``modules`` (those of each epoch), ``stability`` (how alike the modules of two consecutive epochs are; AMI
    and alignment are 1 where no unit moves), and ``labels`` (the module of each unit after each epoch). A module has the name of
    the one before that it shares most units with, matched one to one (Hungarian method); one without a match has a new name.
    """
    epochs = sorted(found)
    modules = pd.concat([found[epoch]["modules"].assign(epoch=epoch) for epoch in epochs], ignore_index=True)
    series = {epoch: _partitions(found[epoch]) for epoch in epochs}
    pairs, labels = [], []
    for key in dict.fromkeys(key for each in series.values() for key in each):
        own = [epoch for epoch in epochs if key in series[epoch]]
        parts = [Partitioned({"layer": key[0], "association": key[1], "epoch": str(e)}, series[e][key].to_numpy()) for e in own]
        pairs += list(pairwise(parts))
        labels += _followed(key, own, [series[epoch][key] for epoch in own])
    stability = comparison_table(pairs, "epoch", ["layer", "association"], shuffles=shuffles, seed=seed)
    stability = stability[[column for column in stability if column not in OF_ASSOCIATIONS]]
    stability = stability.astype({"epoch_a": int, "epoch_b": int})
    frames = {
        "modules": modules,
        "stability": stability,
        "labels": pd.DataFrame(labels, columns=["layer", "association", "epoch", "unit", "module"]),
    }
    return Findings("modularity_epochs", frames, _lines(stability), metadata={"epochs": epochs, "seed": seed, "shuffles": shuffles})


def _partitions(found: Findings) -> dict[tuple[str, str], pd.Series]:
    """{(layer, association): labels of its units}, for those with modules."""
    if found.units is None:
        return {}
    known = zip(found["modules"]["layer"], found["modules"]["association"], strict=True)
    labels = {(layer, name): labels_of(found.units, layer, name) for layer, name in known}
    return {key: each for key, each in labels.items() if each is not None}


def _followed(key: tuple[str, str], epochs: list[int], series: list[pd.Series]) -> list[dict[str, int | str]]:
    """Rows of the table of labels, with names that last."""
    rows: list[dict[str, int | str]] = []
    before, unused = series[0].to_numpy(), 0
    for epoch, each in zip(epochs, series, strict=True):
        before = matched(each.to_numpy(), before, unused or None)
        unused = max(unused, int(np.max(before, initial=-1)) + 1)
        rows += [
            {"layer": key[0], "association": key[1], "epoch": epoch, "unit": unit, "module": int(label)}
            for unit, label in zip(_numbers(each.index), before, strict=True)
        ]
    return rows


def _numbers(index: pd.Index) -> list[int]:
    """The numbers of units in their layer; of the units of all layers, which several layers have, those in the table."""
    return list(range(len(index))) if isinstance(index, pd.MultiIndex) else [int(unit) for unit in index]


def _lines(stability: pd.DataFrame) -> list[str]:
    lines = []
    for (layer, name), rows in stability.groupby(["layer", "association"], sort=False):
        first, last = rows.iloc[0], rows.iloc[-1]
        lines.append(
            f"{layer}, {name}: AMI between epochs {first.epoch_a} and {first.epoch_b} {first.ami:.2f}, between {last.epoch_a} and "
            f"{last.epoch_b} {last.ami:.2f}; alignment {first.alignment:.2f} and {last.alignment:.2f}"
        )
    return lines
