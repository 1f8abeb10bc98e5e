"""The analysis ``supernode_lesions``: supernodes, their halo and what reads them are removed as sets, each against a control."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from nodelens.analysis.ablation.ablate import Setting
from nodelens.analysis.ablation.damage import Damage
from nodelens.analysis.ablation.replacement import HOW, How
from nodelens.analysis.ablation.targets import AblationTarget
from nodelens.analysis.base import Analysis, AnalysisCall
from nodelens.network.groups import PruningGroup
from nodelens.results.findings import Findings
from nodelens.statistics.sample_hash import generator

from .supernode_result import SupernodesResult
from .supernode_tables import GroupConnectivity

CORE, SIZE, WEIGHT = "supernodes", "random, equal size", "random, equal weight"
HALO, OUTSIDE = "halo", "matched outside"
READERS, OTHERS = "readers", "random readers"
BUS, OUTPUTS = "bus", "random outputs"
COLUMNS = ["layer", "set", "control", "given", "damage", "control_damage", "low", "high", "p", "draws"]


@dataclass(frozen=True)
class _Part:
    """A set of units of one layer that is removed, as a row of a table; given: what else is removed."""

    layer: str
    name: str
    units: dict[str, list[int]]
    given: str = ""
    draw: int = 0
    hit_rate: float = float("nan")


@dataclass(frozen=True)
class SupernodeLesions(Analysis):
    """Removes the supernodes of each layer together, their halo, and the units that read them, each against random sets.

    It reads what ``supernodes`` found in the same run: analysis=[supernodes,supernode_lesions]. how: what takes the place of units,
    see ``nl.ablate``; ``mean`` is a control of zero. draws: random sets for each. dose: shares of supernodes in sets of as many
    units, for the dose-response. predictions: number of predictions on which the loss is taken; None: all of the evaluation data.

    Controls: of the supernodes, random sets of other units, as many (equal size), or those nearest to each supernode in weight
    among a random half (equal weight). Of the halo, sets outside matched in loss proxy, with the supernodes in place and with them
    removed: the change of the loss beyond that of the supernodes. Of the readers, which are the units of the next layer with the
    largest share of weight on outputs to which the supernodes write, random units of that layer. Of the bus, which are these
    outputs themselves, removed where the next layer reads them, as many other outputs.

    Tables: ``sets``, one row per layer, set and control: damage, that of the control with the 95 % interval of its draws, and p;
    ``dose``, damage by share of supernodes; ``dose_summary``, its slope per layer with a bootstrap interval. A layer without enough
    other units or outputs, or without a next layer, is listed in ``metadata["missing"]``.
    """

    how: How = "zero"
    draws: int = 19
    dose: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
    predictions: int | None = 16_384

    def __post_init__(self) -> None:
        if self.how not in HOW:
            raise ValueError(f"supernode_lesions: how is {self.how!r}; it is {', '.join(HOW)}")
        if self.draws < 2 or any(not 0 <= share <= 1 for share in self.dose):
            raise ValueError(
                f"supernode_lesions: draws is {self.draws} and dose {list(self.dose)}; draws are from 2 on, doses from 0 to 1"
            )

    def run(self, model: nn.Module, data: Iterable[Any], call: AnalysisCall) -> Findings:
        """Raises ValueError for a run without ``supernodes`` before it."""
        own = next((found for found in call.measured.analyses.values() if isinstance(found, SupernodesResult)), None)
        if own is None:
            raise ValueError("supernode_lesions reads what supernodes found: run it first, analysis=[supernodes,supernode_lesions]")
        seed = call.seed
        setting, missing = Setting.of_table(model, call.evaluation, own.units, saved=call.saved, **call.objective)
        names = [target.name for target in setting.targets]
        parts: list[_Part] = []
        for name, after in zip(names, [*names[1:], None], strict=True):
            drawn, gaps = self._of_layer(own.units.loc[name], name, own.units.loc[after] if after else None, after, seed)
            parts, missing = parts + drawn, missing + gaps
        buses, drawn, gaps = self._buses(setting, own, {part.layer for part in parts}, seed)
        setting, parts, missing = replace(setting, targets=[*setting.targets, *buses]), parts + drawn, missing + gaps
        sets = [part.units for part in parts]
        found = setting.damage(sets, how=self.how, predictions=self.predictions, seed=seed, progress=call.progress)
        table = _table(parts, found)
        dose = table[table["set"] == "dose"].drop(columns=["set", "given"]).reset_index(drop=True)
        frames = {"sets": _controlled(table), "dose": dose, "dose_summary": _slopes(dose, seed)}
        about = {"options": asdict(self), "missing": missing, "seed": seed, "ablation": setting.about(found, own.units.index[:0])}
        return Findings("supernode_lesions", frames, _lines(frames), metadata=about)

    def _of_layer(
        self, units: pd.DataFrame, name: str, following: pd.DataFrame | None, after: str | None, seed: int
    ) -> tuple[list[_Part], list[dict[str, str]]]:
        """The sets of a layer, and what it cannot have."""
        core, halo = (units.index[units[column]].tolist() for column in ("supernode", "halo"))
        outside = units.index[~units["supernode"] & ~units["halo"]].tolist()
        if len(outside) < max(2 * len(core), 2):
            reason = f"{len(outside)} units are outside of its {len(core)} supernodes and their halo: too few to draw from"
            return [], [{"layer": name, "what": "sets", "reason": reason}]
        parts = [_Part(name, CORE, {name: core})]
        parts += list(self._random_cores(units, name, core, outside, seed))
        parts += list(self._halos(units, name, core, halo, outside, seed))
        parts += list(self._doses(name, core, outside, seed))
        if after is None or following is None or following["read_connectivity"].isna().all():
            return parts, [{"layer": name, "what": READERS, "reason": "no next layer that reads its outputs is known"}]
        return parts + list(self._readers(name, core, following["read_connectivity"], after, seed)), []

    def _random_cores(self, units: pd.DataFrame, name: str, core: list[int], outside: list[int], seed: int) -> Iterator[_Part]:
        weight = units["magnitude"]
        for draw in range(self.draws):
            order = _order(outside, seed, "size", name, draw)
            yield _Part(name, SIZE, {name: order[: len(core)]}, draw=draw)
            half = order[: max(len(core), len(order) // 2)]
            yield _Part(name, WEIGHT, {name: _nearest(weight, core, half)}, draw=draw)

    def _halos(
        self, units: pd.DataFrame, name: str, core: list[int], halo: list[int], outside: list[int], seed: int
    ) -> Iterator[_Part]:
        size = np.log(units["loss_proxy"].clip(lower=np.finfo(float).tiny))
        count = min(len(halo), len(outside) // 2)
        some = halo[:count]
        for given, more in (("", []), (CORE, core)):
            yield _Part(name, HALO, {name: [*some, *more]}, given)
            for draw in range(self.draws):
                half = _order(outside, seed, "halo", name, draw)[: max(count, len(outside) // 2)]
                yield _Part(name, OUTSIDE, {name: [*_nearest(size, some, half), *more]}, given, draw)

    def _doses(self, name: str, core: list[int], outside: list[int], seed: int) -> Iterator[_Part]:
        for share in self.dose:
            hits = round(share * len(core))
            for draw in range(self.draws):
                inside, other = (_order(ids, seed, "dose", name, draw) for ids in (core, outside))
                chosen = [*inside[:hits], *other[: len(core) - hits]]
                yield _Part(name, "dose", {name: chosen}, draw=draw, hit_rate=hits / len(core))

    def _readers(self, name: str, core: list[int], reads: pd.Series, after: str, seed: int) -> Iterator[_Part]:
        count = min(len(core), len(reads) // 2)
        top = reads.sort_values(ascending=False, kind="stable").index[:count].tolist()
        rest = [unit for unit in reads.index if unit not in top]
        yield _Part(name, READERS, {after: top})
        for draw in range(self.draws):
            yield _Part(name, OTHERS, {after: _order(rest, seed, "readers", name, draw)[:count]}, draw=draw)

    def _buses(
        self, setting: Setting, own: SupernodesResult, layers: set[str], seed: int
    ) -> tuple[list[AblationTarget], list[_Part], list[dict[str, str]]]:
        """What the layers behind read, as targets; the sets of these outputs; and what cannot be had."""
        options, targets = own.metadata["options"], list[AblationTarget]()
        parts, missing = list[_Part](), list[dict[str, str]]()
        for target, after in pairwise(setting.targets):
            name, group, reader = target.name, target.source, after.source
            if name not in layers or own.units.loc[after.name, "read_connectivity"].isna().all():
                continue
            if not isinstance(group, PruningGroup) or not isinstance(reader, PruningGroup):
                continue
            core = torch.tensor(own.units.loc[name].index[own.units.loc[name, "supernode"]].tolist())
            sizes = (options["connectivity_topk"], options["connectivity_mass_fraction"])
            layout = GroupConnectivity.of(setting.model, group, core, *sizes)
            support, outside = layout.support.tolist(), sorted({*range(layout.width)} - {*layout.support.tolist()})
            if len(outside) < len(support):
                reason = f"the supernodes write to {len(support)} of {layout.width} outputs: too few others; set connectivity_topk"
                missing.append({"layer": name, "what": BUS, "reason": reason})
                continue
            targets.append(AblationTarget.read_by(setting.model, reader, layout.width))
            parts.append(_Part(name, BUS, {targets[-1].name: support}))
            for draw in range(self.draws):
                drawn = _order(outside, seed, "bus", name, draw)[: len(support)]
                parts.append(_Part(name, OUTPUTS, {targets[-1].name: drawn}, draw=draw))
        return targets, parts, missing


def _order(units: Sequence[int], seed: int, word: str, layer: str, draw: int) -> list[int]:
    """The units in an order drawn from the seed."""
    order = torch.randperm(len(units), generator=generator(seed, "lesion", word, layer, str(draw)))
    return [int(units[k]) for k in order]


def _nearest(values: pd.Series, wanted: Sequence[int], among: Sequence[int]) -> list[int]:
    """For each unit wanted, the largest first, the unit among others of the nearest value, without replacement."""
    left = list(among)
    found = []
    for unit in sorted(wanted, key=lambda unit: -values[unit]):
        near = min(left, key=lambda other: abs(values[other] - values[unit]))
        left.remove(near)
        found.append(near)
    return found


def _table(parts: Sequence[_Part], found: Damage) -> pd.DataFrame:
    rows = [(p.layer, p.name, p.given, p.draw, p.hit_rate, sum(map(len, p.units.values()))) for p in parts]
    table = pd.DataFrame(rows, columns=["layer", "set", "given", "draw", "hit_rate", "units"])
    return table.assign(damage=found.change, damage_se=found.error)


def _controlled(table: pd.DataFrame) -> pd.DataFrame:
    """Each set against its controls; damage given the supernodes is that beyond the damage of the supernodes alone."""
    rows = []
    for layer, own in table.groupby("layer", sort=False):
        alone = own.loc[own["set"] == CORE, "damage"].iloc[0]
        for name, control in ((CORE, SIZE), (CORE, WEIGHT), (HALO, OUTSIDE), (READERS, OTHERS), (BUS, OUTPUTS)):
            for given in own.loc[own["set"] == name, "given"]:
                pair = (own[(own["set"] == which) & (own["given"] == given)]["damage"] for which in (name, control))
                value, drawn = (part.to_numpy() - (alone if given == CORE else 0) for part in pair)
                rows.append({"layer": layer, "set": name, "control": control, "given": given} | _against(value[0], drawn))
    return pd.DataFrame(rows, columns=COLUMNS)


def _against(value: float, drawn: np.ndarray) -> dict[str, Any]:
    """A value against random draws: their mean and 95 % interval, and a one-sided p that counts the value itself."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    p = (1 + (drawn >= value).sum()) / (1 + len(drawn))
    return {"damage": value, "control_damage": drawn.mean(), "low": low, "high": high, "p": p, "draws": len(drawn)}


def _slopes(dose: pd.DataFrame, seed: int, draws: int = 200) -> pd.DataFrame:
    """Per layer the slope of the damage over the share of supernodes, with a 95 % bootstrap interval over draws of sets."""
    rows = {}
    for layer, own in dose.groupby("layer", sort=False):
        wide = own.pivot_table(index="draw", columns="hit_rate", values="damage").to_numpy()
        x = np.sort(own["hit_rate"].unique())
        if len(x) < 2:
            continue
        weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
        at = torch.randint(len(wide), (draws, len(wide)), generator=generator(seed, "slope", str(layer))).numpy()
        slopes = wide[at].mean(1) @ weights
        low, high = np.quantile(slopes, [0.025, 0.975])
        rows[layer] = {"slope": float(wide.mean(0) @ weights), "low": low, "high": high}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["slope", "low", "high"]).rename_axis("layer")


def _lines(frames: dict[str, pd.DataFrame]) -> list[str]:
    lines = []
    for (name, control, given), own in frames["sets"].groupby(["set", "control", "given"], sort=False):
        least = 1 / (1 + int(own["draws"].max()))
        beyond = f"p <= 0.05 in {int((own['p'] <= 0.05).sum())}" if least <= 0.05 else f"p is {least:.2g} or more with so few draws"
        where = f" beyond the {given}" if given else ""
        lines.append(
            f"{name}{where}: damage {own['damage'].mean():.4g}, {control} {own['control_damage'].mean():.4g} (mean of {len(own)} "
            f"layers; {beyond})"
        )
    slopes = frames["dose_summary"]
    if len(slopes):
        lines.append(f"damage rises with the share of supernodes in {int((slopes['low'] > 0).sum())} of {len(slopes)} layers")
    return lines
