"""``nl.ablate``: the change of the loss when units are removed, one by one or in sets."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import nn

from nodelens.engine.driver import Driver, device_of, shared_first
from nodelens.engine.identity import identity
from nodelens.engine.request import Layers
from nodelens.engine.saved_work import SavedWork
from nodelens.messages import as_seed
from nodelens.network.arguments import check_arguments
from nodelens.network.batch import Batch
from nodelens.network.eval_mode import eval_mode, one_at_a_time, uncompiled
from nodelens.network.groups import PruningGroup
from nodelens.network.layers import Layer
from nodelens.network.loss_scale import Loss
from nodelens.network.objective import Objective
from nodelens.network.outputs import Output
from nodelens.results.result import Result, fingerprint, provenance

from .damage import Damage, Progress, damage_of
from .lesions import Lesion
from .replacement import How, Replacement
from .targets import AblationTarget, Units, as_mapping, calls_of, check_units, chosen_units, find_targets, targets_of_table


@one_at_a_time
def ablate(
    model: nn.Module,
    data: Iterable[Any],
    units: Any = None,
    *,
    how: How = "zero",
    layers: Layers | None = None,
    sample: int | None = None,
    predictions: int | None = None,
    seed: int = 0,
    replay: bool = True,
    task: str | None = None,
    output: Output = None,
    loss: Loss | None = None,
    progress: Progress = iter,
) -> Result:
    """The damage of each unit: loss of the model without the unit minus loss with it, per prediction (in nats for cross-entropy).

    A unit is removed where it is read, as a pruning mask removes it, in eval mode. The part of the network before a unit's place
    runs once per batch and not once per unit, and several units share a pass.

    data:        batches as for ``nl.analyze``, with labels; read twice for how=mean and how=resample. Under a process group each
                 process gives its own share, which may be empty
    units:       {layer: ids}, or a table with the index (layer, unit), such as ``result.units``; default all
    how:         ``zero``; ``mean``, the unit's mean over the data; ``resample``, its value in another sample, one of up to 64
                 that the seed draws from the data, at the same position (for texts, at the real token of the same number). Neither
                 depends on the batches or on the number of processes
    layers:      names, globs or roles as for ``nl.analyze``, or pruning groups; default the pruning groups of the model, under
                 the names by which they are pruned. The units of a layer are removed from its output
    sample:      number of units per layer, drawn uniformly without replacement from the seed, instead of all
    predictions: read data until there are so many predictions, in whole samples; default all data. Processes count together, and
                 take their samples in turn, which is the order of the whole data if process r of N has the samples r, r + N, ...
    replay:      False runs the whole model for each unit, which is slower and gives the same numbers up to rounding
    task, output, loss: as in ``AnalyzeOptions``

    Returns a ``Result``: units with the index (layer, unit) and the columns damage and damage_se, the standard error over samples
    of the paired difference; layers with the number of units and their mean, largest and summed damage. The metadata tell the loss
    of the whole model, the number of predictions and samples, the layers for which the whole model had to run, and whether
    convolutions ran in compiled loops (kernels).

    Raises ValueError for layers or units that are not there, data without labels or readable only once, and how=resample where
    all samples are equal or differ in size.
    """
    seed = as_seed(seed)
    setting = Setting.of(model, data, layers, task=task, output=output, loss=loss)
    index = setting.chosen(sample, seed, units)
    if not len(index):
        raise ValueError("there are no units to ablate: units= or sample= leaves none")
    options: dict[str, Any] = {"how": how, "predictions": predictions, "seed": seed, "replay": replay}
    found = setting.damage([{name: [unit]} for name, unit in index], progress=progress, **options)
    table = pd.DataFrame({"damage": found.change, "damage_se": found.error}, index=index)
    damage = table["damage"].groupby(level="layer", sort=False)
    by_layer = pd.DataFrame(
        {"units": damage.size(), "damage_mean": damage.mean(), "damage_max": damage.max(), "damage_sum": damage.sum()}
    )
    return Result(table, by_layer, {}, setting.about(found, index) | {"options": options | {"sample": sample}})


@one_at_a_time
def ablate_sets(
    model: nn.Module,
    data: Iterable[Any],
    sets: Mapping[str, Any],
    *,
    how: How = "zero",
    layers: Layers | None = None,
    predictions: int | None = None,
    seed: int = 0,
    task: str | None = None,
    output: Output = None,
    loss: Loss | None = None,
) -> pd.DataFrame:
    """The damage when the units of a set are removed together: one row per set, columns units, damage and damage_se.

    sets: {name: units}, units as for ``nl.ablate``; the other arguments are those of ``nl.ablate``. Raises ValueError as it does.
    """
    if not isinstance(sets, Mapping):
        raise ValueError(f"sets is {type(sets).__name__}; it is {{name: units}}, such as {{'all': {{'fc1': [0, 1]}}}}")
    setting = Setting.of(model, data, layers, task=task, output=output, loss=loss)
    given = {name: as_mapping(units) for name, units in sets.items()}
    found = setting.damage(list(given.values()), how=how, predictions=predictions, seed=as_seed(seed))
    counts = [sum(len(ids) for ids in units.values()) for units in given.values()]
    table = {"units": counts, "damage": found.change, "damage_se": found.error}
    return pd.DataFrame(table, index=pd.Index(list(given), name="set"))


@dataclass(frozen=True)
class Setting:
    """A model, its data, what it predicts, and the units that can be removed. saved: where unfinished readings are kept."""

    model: nn.Module
    data: Iterable[Any]
    objective: Objective
    targets: Sequence[AblationTarget]
    saved: SavedWork | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        data: Iterable[Any],
        layers: Layers | None = None,
        *,
        task: str | None = None,
        output: Output = None,
        loss: Loss | None = None,
    ) -> "Setting":
        """Raises ValueError for empty data, for a model without units, and for layers that are not there."""
        found, batch = cls._opened(model, data, task, output, loss)
        shown = {} if layers is None else calls_of(found.model, partial(found.objective.run, found.model, batch))
        return replace(found, targets=find_targets(found.model, layers, batch, shown))

    @classmethod
    def of_table(
        cls,
        model: nn.Module,
        data: Iterable[Any],
        units: pd.DataFrame,
        *,
        saved: SavedWork | None = None,
        task: str | None = None,
        output: Output = None,
        loss: Loss | None = None,
    ) -> tuple["Setting", list[dict[str, str]]]:
        """The units of a table with the index (layer, unit): of the pruning group of the layer's name, else of the layer's output.

        Also returns the layers that cannot be ablated, with the reason. Raises ValueError for empty data.
        """
        found, batch = cls._opened(model, data, task, output, loss)
        shown = calls_of(found.model, partial(found.objective.run, found.model, batch))
        counts = units.groupby(level="layer", sort=False).size()
        targets, missing = targets_of_table(found.model, {str(name): int(n) for name, n in counts.items()}, batch, shown)
        return replace(found, targets=targets, saved=saved), missing

    @classmethod
    def _opened(
        cls, model: nn.Module, data: Iterable[Any], task: str | None, output: Output, loss: Loss | None
    ) -> tuple["Setting", Batch]:
        """The setting without targets, and the first two samples."""
        model = uncompiled(model)
        check_arguments("nl.ablate", model, data)
        objective = Objective.of(model, output, task, loss)
        first, whole = shared_first(data, objective)
        if first is None:
            raise ValueError(
                "the data are empty: there is nothing to predict, so ablation cannot be measured. An iterator is empty after one "
                "reading: give a loader or a list"
            )
        objective = objective.settled(model, first)
        own = iter(whole) if iter(data) is data else data
        return cls(model, own, objective, ()), objective.batch(first).head(2).to(device_of(model))

    @property
    def layers(self) -> list[Layer | PruningGroup]:
        """The targets as ``nl.analyze`` takes them."""
        return [target.source for target in self.targets]

    def chosen(self, sample: int | None, seed: int, units: Any = None) -> pd.MultiIndex:
        """The index (layer, unit) of the units given, of ``sample`` units per layer drawn from the seed, or of all."""
        ids = chosen_units(self.targets, units, sample, seed)
        return pd.MultiIndex.from_tuples([(name, unit) for name, own in ids.items() for unit in own], names=["layer", "unit"])

    def damage(
        self,
        removed: Sequence[Units],
        *,
        how: str = "zero",
        contrasts: Sequence[Mapping[int, float]] = (),
        predictions: int | None = None,
        seed: int = 0,
        replay: bool = True,
        progress: Progress = iter,
    ) -> Damage:
        """The change of the loss when each of the sets of units is removed; contrasts: see ``damage_of``."""
        by_name = {target.name: target for target in self.targets}
        for units in removed:
            for name, ids in units.items():
                check_units(by_name, name, ids)
        if predictions is not None and predictions < 1:
            raise ValueError(f"predictions is {predictions}; it is a number of predictions, 1 or more, or None for all data")
        used = {name for units in removed for name in units}
        self._check_how(how, used)
        lesions, driver = [Lesion.of(by_name, units) for units in removed], Driver(self.model, self.objective)
        with torch.inference_mode(False), eval_mode(self.model):
            values = Replacement.of(how, driver, self.data, [by_name[name] for name in by_name if name in used], seed)
        options: dict[str, Any] = {"predictions": predictions, "replay": replay, "progress": progress}
        options["saved"] = self.saved
        options["what"] = identity([how, predictions, replay, removed, contrasts])
        return damage_of(self.model, self.data, lesions, values, objective=self.objective, contrasts=contrasts, **options)

    def about(self, found: Damage, index: pd.MultiIndex) -> dict[str, Any]:
        """The entries of the metadata."""
        whole = list(dict.fromkeys(index[list(found.whole)].get_level_values("layer"))) if found.whole else []
        return provenance() | {
            "loss": found.loss,
            "predictions": found.predictions,
            "samples": found.samples,
            "whole_model": whole,
            "kernels": found.kernels,
            "objective": self.objective.about,
            "model": {"class": type(self.model).__name__, "fingerprint": fingerprint(self.model)},
        }

    def _check_how(self, how: str, names: set[str]) -> None:
        if how in ("mean", "resample") and iter(self.data) is self.data:
            raise ValueError(f"how={how} reads the data twice, but they are an iterator: give a loader or a list of batches")
        held = [target.name for target in self.targets if target.weights is not None and target.name in names]
        if how != "zero" and held:
            raise ValueError(f"how={how}: the units of {held[0]} are experts that share a tensor, which can only be zeroed")
