"""The analysis ``cascade``: damage when several units of one type are removed, and how well columns predict damage."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from nodelens.analysis.ablation.ablate import Setting
from nodelens.analysis.ablation.damage import Damage
from nodelens.analysis.ablation.draws import random_pairs
from nodelens.analysis.ablation.replacement import HOW, How
from nodelens.analysis.base import Analysis, AnalysisCall, Progress
from nodelens.analysis.clusters.unit_types import NONE
from nodelens.analysis.validity.ranking import agreement, ranking
from nodelens.results.findings import Findings
from nodelens.results.result import Result, values_of

from .kinds import ANY, drawn_sets, kinds_of, strongest_pairs

_BUDGET = 0.1  # share of the units, for the recall


@dataclass(frozen=True)
class CascadeAnalysis(Analysis):
    """Removes k units of one type together, and compares the damage with that of k random units of the same layer.

    by: the column of types, such as ``unit_type`` of the analysis clusters; of a column of numbers, the quarters of each layer.
    counts: numbers of units that are removed together. draws: sets per layer, type and count, drawn from the seed. pair: the name
    of a matrix of pairs, whose strongest pairs are removed together; None: pairs of two units of the type ``pair_type``. pairs:
    how many per layer, with as many random ones. how, sample, predictions: see ``nl.ablate``; sample: units that are ablated one by
    one to test which columns predict damage.

    Tables: ``curves`` (one row per set), ``types`` (per layer, type and count: damage, that of random sets with the interval of
    their draws, and p), ``prediction`` (per column, see ``validity``), ``pairs`` (interaction of strong and of random pairs) and
    ``pair_summary``. Layers that cannot be ablated are in ``metadata["missing"]``.
    """

    by: str = "unit_type"
    counts: Sequence[int] = (1, 2, 4, 8)
    draws: int = 8
    pair: str | None = None
    pair_type: str = "synergistic"
    pairs: int = 10
    how: How = "zero"
    sample: int | None = None
    predictions: int | None = 16_384
    resamples: int = 200

    def __post_init__(self) -> None:
        if self.how not in HOW:
            raise ValueError(f"cascade: how is {self.how!r}; it is {', '.join(HOW)}")
        wrong = [count for count in self.counts if count < 1]
        if wrong or self.draws < 2 or self.pairs < 0:
            raise ValueError(
                f"cascade: counts is {list(self.counts)}, draws {self.draws} and pairs {self.pairs}; counts are from 1 on, draws "
                "from 2 on, pairs from 0 on"
            )

    def run(self, model: nn.Module, data: Iterable[Any], call: AnalysisCall) -> Findings:
        """Raises ValueError for a column or matrix that the run does not have, or without a layer that can be ablated."""
        result, seed = call.measured, call.seed
        kinds = self._kinds(result)
        setting, missing = Setting.of_table(model, call.evaluation, result.units, saved=call.saved, **call.objective)
        if not setting.targets:
            raise ValueError(f"cascade: no layer of the table can be ablated: {missing[0]['layer']}: {missing[0]['reason']}")
        kinds = kinds[kinds.index.get_level_values("layer").isin([target.name for target in setting.targets])]
        sets, pairs = self._sets(kinds, seed), self._pairs(kinds, result, seed)
        alone = [] if "damage" in result.units else list(setting.chosen(self.sample, seed))
        found, contrast = self._measured(setting, sets, pairs, alone, seed, call.progress)
        curves = sets.drop(columns="removed").assign(damage=found.change[: len(sets)], damage_se=found.error[: len(sets)])
        single = _single(result, alone, found, len(sets))
        table = result.units[values_of(result.units)].drop(columns=["damage", "damage_se"], errors="ignore")
        table = table.reindex(single.index).assign(damage=single)
        metrics = [name for name in table.columns.drop("damage") if table[name].nunique() > 1]
        agreed = agreement(table, metrics, "damage", self.resamples, seed)
        frames = {
            "curves": curves,
            "types": _against_random(curves),
            "prediction": ranking(table, agreed, metrics, _BUDGET),
            "pairs": pairs.assign(**contrast),
            "pair_summary": _pair_summary(pairs.assign(**contrast)),
        }
        about = {"options": asdict(self), "missing": missing, "ablation": setting.about(found, table.index[:0]), "seed": seed}
        return Findings("cascade", frames, _lines(frames, max(self.counts)), metadata=about)

    def _kinds(self, result: Result) -> pd.Series:
        if self.by not in result.units:
            known = ", ".join(map(str, result.units.columns)) or "none"
            raise ValueError(
                f"cascade reads types in the column {self.by!r}, and the table of units has {known}: run clusters first, "
                "analysis=[clusters,cascade], or give by="
            )
        if self.pair is not None and all(name != self.pair for _, name in result.matrices):
            known = ", ".join(sorted({name for _, name in result.matrices})) or "none"
            raise ValueError(
                f"cascade: pair is {self.pair!r}; the matrices of the run are {known}: measure it, metrics=[{self.pair}]"
            )
        return kinds_of(result.units[self.by])

    def _sets(self, kinds: pd.Series, seed: int) -> pd.DataFrame:
        """One row per set of units of one type, or of any."""
        rows = []
        for layer, own in kinds.groupby(level="layer", sort=False):
            ids = own.index.get_level_values("unit")
            groups = {ANY: ids.tolist()} | {str(kind): ids[own == kind].tolist() for kind in sorted(own.unique()) if kind != NONE}
            for kind, units in groups.items():
                for count in self.counts:
                    for draw, some in enumerate(drawn_sets(units, count, self.draws, seed, str(layer), kind)):
                        rows.append({"layer": layer, "type": kind, "count": count, "draw": draw, "removed": {str(layer): some}})
        return pd.DataFrame(rows, columns=["layer", "type", "count", "draw", "removed"])

    def _pairs(self, kinds: pd.Series, result: Result, seed: int) -> pd.DataFrame:
        """One row per pair: layer, unit, other, and whether it is strong or random."""
        rows: list[tuple[str, int, int, str]] = []
        for layer, own in kinds.groupby(level="layer", sort=False):
            ids = own.index.get_level_values("unit").tolist()
            if self.pair is None:
                same = own[own == self.pair_type]
                strong = [(a, b) for _, a, b in random_pairs(same.to_frame(), self.pairs, seed)] if len(same) > 1 else []
            else:
                matrix = result.matrices.get((str(layer), self.pair))
                strong = [] if matrix is None else strongest_pairs(matrix, ids, self.pairs)
            other = random_pairs(own.to_frame(), len(strong), seed + 1) if strong else []
            rows += [(str(layer), a, b, self.pair or self.pair_type) for a, b in strong]
            rows += [(str(layer), a, b, "random") for _, a, b in other]
        return pd.DataFrame(rows, columns=["layer", "unit", "other", "pair"])

    def _measured(
        self,
        setting: Setting,
        sets: pd.DataFrame,
        pairs: pd.DataFrame,
        alone: Sequence[tuple[str, int]],
        seed: int,
        progress: Progress,
    ) -> tuple[Damage, dict[str, np.ndarray]]:
        """Damage of the sets, of single units, of pairs and of their units; and the interaction of each pair with its error."""
        removed = [*sets["removed"], *({layer: [unit]} for layer, unit in alone)]
        start, contrasts = len(removed), []
        for k, (layer, a, b, _) in enumerate(pairs.itertuples(index=False)):
            removed += [{layer: [a, b]}, {layer: [a]}, {layer: [b]}]
            contrasts.append({start + 3 * k: 1.0, start + 3 * k + 1: -1.0, start + 3 * k + 2: -1.0})
        options: dict[str, Any] = {"how": self.how, "predictions": self.predictions, "seed": seed, "progress": progress}
        found = setting.damage(removed, contrasts=contrasts, **options)
        both, a, b = (found.change[start + k :: 3] for k in range(3))
        columns = {"damage": both, "alone": a + b, "interaction": found.contrast, "interaction_se": found.contrast_error}
        return found, columns


def _single(result: Result, alone: Sequence[tuple[str, int]], found: Damage, start: int) -> pd.Series:
    """The damage of single units: the column of the run, or what was measured here."""
    if not alone:
        return result.units["damage"].dropna()
    index = pd.MultiIndex.from_tuples(alone, names=["layer", "unit"])
    return pd.Series(found.change[start : start + len(alone)], index=index, name="damage")


def _against_random(curves: pd.DataFrame) -> pd.DataFrame:
    """One row per layer, type and count: mean damage, that of random sets, their 95 % interval, and p of a mean as far from theirs.

    p is two-sided and from the random draws, with the set itself counted; it is at least 1 / (draws + 1).
    """
    rows = []
    for (layer, count), part in curves.groupby(["layer", "count"], sort=False):
        random = part.loc[part["type"] == ANY, "damage"].to_numpy()
        for kind, own in part[part["type"] != ANY].groupby("type", sort=False):
            value, centre = own["damage"].mean(), random.mean() if len(random) else np.nan
            further = np.abs(random - centre) >= abs(value - centre)
            low, high = np.quantile(random, [0.025, 0.975]) if len(random) > 1 else (np.nan, np.nan)
            row = {"layer": layer, "type": kind, "count": count, "damage": value, "damage_sd": own["damage"].std()}
            row |= {"sets": len(own), "random": centre, "random_low": low, "random_high": high}
            rows.append(row | {"p": (1 + further.sum()) / (1 + len(random)) if len(random) else np.nan})
    names = ["layer", "type", "count", "damage", "damage_sd", "sets", "random", "random_low", "random_high", "p"]
    return pd.DataFrame(rows, columns=names)


def _pair_summary(pairs: pd.DataFrame) -> pd.DataFrame:
    """Per kind of pair: their number, mean interaction with its standard error over pairs, mean size, share beyond two errors."""
    rows = {}
    for kind, own in pairs.groupby("pair", sort=False):
        value = own["interaction"]
        rows[kind] = {
            "pairs": len(own),
            "interaction": value.mean(),
            "interaction_se": value.std() / np.sqrt(len(own)),
            "size": value.abs().mean(),
            "beyond_two_se": (value.abs() > 2 * own["interaction_se"]).mean(),
        }
    names = ["pairs", "interaction", "interaction_se", "size", "beyond_two_se"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=names).rename_axis("pair")


def _lines(frames: dict[str, pd.DataFrame], most: int) -> list[str]:
    types = frames["types"]
    top = types[types["count"] == most] if (types["count"] == most).any() else types
    lines = []
    for kind, own in top.groupby("type", sort=False):
        beyond = int(((own["damage"] < own["random_low"]) | (own["damage"] > own["random_high"])).sum())
        lines.append(
            f"{own['count'].iloc[0]} {kind} units: damage {own['damage'].mean():.4g}, random units {own['random'].mean():.4g} "
            f"(mean of {len(own)} layers; outside of the random interval in {beyond})"
        )
    ranked = frames["prediction"]
    if len(ranked):
        best = ranked.iloc[0]
        interval = f"({best['low']:.2f} to {best['high']:.2f})"
        lines.append(f"best predictor of damage: {ranked.index[0]}, Spearman {best['spearman']:.2f} {interval}")
    for kind, row in frames["pair_summary"].iterrows():
        lines.append(f"{int(row['pairs'])} {kind} pairs: interaction {row['interaction']:.3g} +- {row['interaction_se']:.2g}")
    return lines
