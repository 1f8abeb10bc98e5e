"""The analysis ``validity``: which metrics predict the damage when units are removed."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from torch import nn

from nodelens.analysis.ablation.ablate import Setting
from nodelens.analysis.ablation.damage import Damage
from nodelens.analysis.ablation.draws import at_random, check_shares, lowest_first, random_pairs
from nodelens.analysis.ablation.replacement import HOW, How
from nodelens.analysis.base import Analysis, AnalysisCall, Progress
from nodelens.analysis.supernodes.agreement import hits
from nodelens.results.findings import Findings
from nodelens.results.result import Result, values_of

from .catalogue import all_scores
from .combination import check_components, combination, criterion_of, lines_of
from .ranking import agreement, ranking

RANDOM = "random"
TRUTH = "damage"


@dataclass(frozen=True)
class ValidityAnalysis(Analysis):
    """Removes units one by one, and compares every metric of the units with the true change of the loss.

    scores: ``measured``, the metrics of the run, or ``all``, all metrics of units in the catalogue besides. how: what takes the
    place of a unit, see ``nl.ablate``. sample: number of units per layer, drawn from the seed; None: all. predictions: number of
    predictions on which the loss is taken, the first of the evaluation data, see ``nl.ablate``; None: all of them. budgets: shares
    of the units for the recall; the first is that of the ranking. pairs: number of pairs of units of one layer that are removed
    together. shares, curves, draws: of the units of each layer, these shares are removed lowest score first, for the damage itself,
    as many of the best metrics as curves says, and as many random orders as draws says. resamples: of the bootstrap over units.
    combine: 2 to 6 metrics, none of them below 0; the exponents of the product that orders the units best by their damage are
    searched on one half of the units, and judged on the other (see ``combination``).

    Units are removed as their layer is named: of a pruning group of that name, where they are read; of any other layer, from its
    output. Tables: ``ranking``, one row per metric, the best first; ``agreement`` and ``recall``, by layer; ``pairs``; ``growing``;
    with ``combine`` also ``combination``, and the product as a criterion for ``nl.prune`` in ``metadata["criterion"]``.
    Columns of units: ``damage`` and ``damage_se``. What cannot be ablated or measured is in ``metadata["missing"]``.
    """

    scores: Literal["measured", "all"] = "measured"
    how: How = "zero"
    sample: int | None = None
    predictions: int | None = 16_384
    budgets: Sequence[float] = (0.1, 0.02, 0.05, 0.2)
    pairs: int = 100
    shares: Sequence[float] = (0.05, 0.1, 0.2, 0.4)
    curves: int = 6
    draws: int = 10
    resamples: int = 200
    combine: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.scores not in ("measured", "all"):
            raise ValueError(f"validity: scores is {self.scores!r}; it is measured or all")
        if self.how not in HOW:
            raise ValueError(f"validity: how is {self.how!r}; it is {', '.join(HOW)}")
        check_shares("validity", [*self.budgets, *self.shares])
        counts = {name: getattr(self, name) for name in ("pairs", "curves", "draws", "resamples")}
        wrong = [name for name, value in counts.items() if value < 0]
        if wrong:
            raise ValueError(f"validity: {wrong[0]} is {counts[wrong[0]]}; it is a number from 0 on")

    def run(self, model: nn.Module, data: Iterable[Any], call: AnalysisCall) -> Findings:
        """Raises ValueError for a run without metrics of units, or without a unit that can be ablated."""
        result, seed = call.measured, call.seed
        if not len(result.units):
            raise ValueError("validity compares metrics with the damage, but none is measured: give some, as metrics=[taylor]")
        setting, missing = Setting.of_table(model, call.evaluation, result.units, saved=call.saved, **call.objective)
        if not setting.targets:
            raise ValueError(f"validity: no layer of the table can be ablated: {missing[0]['layer']}: {missing[0]['reason']}")
        table, refused = self._scored(model, data, result, setting, seed, call.objective)
        missing += refused
        if self.combine:
            check_components(table, self.combine)
        units = setting.chosen(self.sample, seed)
        pairs = random_pairs(pd.DataFrame(index=units), self.pairs, seed)
        found = self._single_and_pairs(setting, units, pairs, seed, call.progress)
        table = table.reindex(units).assign(**{TRUTH: found.change[: len(units)], f"{TRUTH}_se": found.error[: len(units)]})
        metrics, constant = _usable(table)
        missing += constant
        agreed = agreement(table, [*metrics], TRUTH, self.resamples, seed)
        ranked = ranking(table, agreed, metrics, self.budgets[0], TRUTH)
        frames = {
            "ranking": ranked,
            "agreement": agreed,
            "recall": hits(table, metrics, TRUTH, sorted(self.budgets)).rename(columns={"score": "metric", "hits": "recall"}),
            "pairs": _pair_table(pairs, found, units),
            "growing": self._growing(setting, table, list(ranked.index[: self.curves]), seed, call.progress),
        }
        about = {"options": asdict(self), "missing": missing, "ablation": setting.about(found, units), "seed": seed}
        lines = _lines(frames, table, found, self.budgets[0])
        if self.combine:
            frames["combination"], exponents = combination(table, self.combine, TRUTH, self.resamples, seed)
            about["criterion"], lines = criterion_of(exponents), lines + lines_of(frames["combination"], exponents)
        return Findings("validity", frames, lines, units=table[[TRUTH, f"{TRUTH}_se"]], metadata=about)

    def _scored(
        self, model: nn.Module, data: Iterable[Any], result: Result, setting: Setting, seed: int, objective: dict[str, Any]
    ) -> tuple[pd.DataFrame, list[dict[str, str]]]:
        """The metrics of the run and, for ``all``, of the catalogue; and those that cannot be measured, with the reason."""
        table = result.units[values_of(result.units)]
        if self.scores == "measured":
            return table, []
        more, refused = all_scores(model, data, setting, set(table), seed, objective)
        return table.join(more), refused

    def _single_and_pairs(
        self, setting: Setting, units: pd.MultiIndex, pairs: Sequence[tuple[str, int, int]], seed: int, progress: Progress
    ) -> Damage:
        """The damage of each unit, then of each pair; contrasts: of each pair less that of its units."""
        at = {unit: k for k, unit in enumerate(units)}
        removed = [{layer: [unit]} for layer, unit in units] + [{layer: [a, b]} for layer, a, b in pairs]
        contrasts = [{len(units) + k: 1.0, at[la, a]: -1.0, at[la, b]: -1.0} for k, (la, a, b) in enumerate(pairs)]
        options: dict[str, Any] = {"how": self.how, "predictions": self.predictions, "seed": seed, "progress": progress}
        return setting.damage(removed, contrasts=contrasts, **options)

    def _growing(
        self, setting: Setting, table: pd.DataFrame, metrics: Sequence[str], seed: int, progress: Progress
    ) -> pd.DataFrame:
        """Damage when growing shares of each layer are removed: columns order, draw, share, units, damage, damage_se."""
        orders = [(TRUTH, 0), *((metric, 0) for metric in metrics), *((RANDOM, draw) for draw in range(self.draws))]
        every = [(order, draw, share) for order, draw in orders for share in self.shares]
        sets = [
            at_random(table, share, seed, k) if name == RANDOM else lowest_first(table[name], share) for name, k, share in every
        ]
        rows = pd.DataFrame(every, columns=["order", "draw", "share"])
        if not every:
            return rows.assign(units=0, damage=0.0, damage_se=0.0)
        found = setting.damage(sets, how=self.how, predictions=self.predictions, seed=seed, progress=progress)
        counts = [sum(map(len, removed.values())) for removed in sets]
        return rows.assign(units=counts, damage=found.change, damage_se=found.error)


def _usable(table: pd.DataFrame) -> tuple[list[str], list[dict[str, str]]]:
    """The metrics with two different numbers at least, and the others as missing."""
    names = [name for name in values_of(table) if name not in (TRUTH, f"{TRUTH}_se")]
    usable = [name for name in names if table[name].replace([np.inf, -np.inf], np.nan).nunique() > 1]
    reason = "it has the same number, or none, for every unit"
    return usable, [{"layer": "all layers", "what": name, "reason": reason} for name in names if name not in usable]


def _pair_table(pairs: Sequence[tuple[str, int, int]], found: Damage, units: pd.MultiIndex) -> pd.DataFrame:
    """One row per pair: damage of both, the sum of that of each, their difference, the interaction, and its standard error."""
    single = pd.Series(found.change[: len(units)], index=units)
    rows = pd.DataFrame(pairs, columns=["layer", "unit", "other"])
    alone = [single[layer, a] + single[layer, b] for layer, a, b in pairs]
    both = found.change[len(units) :]
    return rows.assign(damage=both, alone=alone, interaction=found.contrast, interaction_se=found.contrast_error)


def _lines(frames: dict[str, pd.DataFrame], table: pd.DataFrame, found: Damage, budget: float) -> list[str]:
    size, error = table[TRUTH].abs(), table[f"{TRUTH}_se"]
    lines = [
        f"{len(table):,} units ablated one by one on {found.predictions:,} predictions (loss {found.loss:.4f}); the loss falls for "
        f"{(table[TRUTH] < 0).mean():.0%} of them, and {(size > 2 * error).mean():.0%} of the changes exceed two standard errors"
    ]
    ranked = frames["ranking"]
    for place, (metric, row) in enumerate(ranked.head(3).iterrows(), 1):
        lines.append(
            f"{place}. {metric}: Spearman {row['spearman']:.2f} ({row['low']:.2f} to {row['high']:.2f}), recall at {budget:.0%} "
            f"{row['recall']:.2f} (chance {row['chance']:.2f})"
        )
    if len(ranked) > 3:
        last = ranked.iloc[-1]
        lines.append(f"last of {len(ranked)}: {ranked.index[-1]}, Spearman {last['spearman']:.2f}")
    pairs = frames["pairs"]
    if len(pairs):
        beyond = (pairs["interaction"].abs() > 2 * pairs["interaction_se"]).mean()
        lines.append(f"{len(pairs)} pairs of units: the interaction exceeds two standard errors in {beyond:.0%}")
    return lines
