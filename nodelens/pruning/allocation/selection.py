"""Which units of each group are removed: by constraint, then by score, then by a seeded permutation."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch

from nodelens.messages import listed, nearest
from nodelens.network.groups import PruningGroup
from nodelens.statistics.sample_hash import generator

Mode = Literal["low", "high", "random"]
NanPolicy = Literal["drop", "keep"]
Units = Mapping[str, Iterable[int]]

EARLIER, FIRST, UNSCORED_FIRST, SCORED, UNSCORED_LAST, PROTECTED = range(6)  # classes of units, in the order of removal


@dataclass(frozen=True, eq=False)
class Rules:
    """What determines the order in which a group's units are removed, besides the scores.

    mode: ``low`` removes the smallest scores, ``high`` the largest, ``random`` replaces the scores by uniform draws.
    nan_policy: units without a score are removed before all others (``drop``) or after them (``keep``).
    protected units are never removed, ``first`` before the rest, ``removed`` by an earlier plan: {group: unit ids}.
    """

    mode: Mode
    seed: int
    nan_policy: NanPolicy
    protected: Mapping[str, np.ndarray]
    first: Mapping[str, np.ndarray]
    removed: Mapping[str, np.ndarray]

    @classmethod
    def of(
        cls,
        groups: Sequence[PruningGroup],
        mode: Mode = "low",
        seed: int = 0,
        nan_policy: NanPolicy = "drop",
        protected: Units | None = None,
        first: Units | None = None,
        removed: Units | None = None,
    ) -> "Rules":
        """Raises ValueError for an unknown mode, policy, group or unit, or a unit that is both protected and removed."""
        if mode not in ("low", "high", "random"):
            raise ValueError(f"mode is {mode!r}: low removes the smallest scores, high the largest, random any")
        if nan_policy not in ("drop", "keep"):
            raise ValueError(f"nan_policy is {nan_policy!r}: units without a score are removed first (drop) or last (keep)")
        sets = {"protected": protected, "first": first, "removed": removed}
        rules = cls(mode, seed, nan_policy, **{what: _ids(groups, units or {}, what) for what, units in sets.items()})
        for name, removed_ids in rules.removed.items():
            both = np.intersect1d(removed_ids, rules.protected.get(name, ()))
            if len(both):
                raise ValueError(f"group {name!r}: unit {int(both[0])} is protected, and an earlier plan has removed it")
        return rules

    def keys(self, group: PruningGroup, values: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Class, score and tie-breaking draw per unit, (n,) each; lower is removed earlier, except the score in mode ``high``."""
        draws = torch.rand(group.n, generator=generator(self.seed, group.name), dtype=torch.float64).numpy()
        scores = draws if values is None or self.mode == "random" else values
        unscored = UNSCORED_FIRST if self.nan_policy == "drop" else UNSCORED_LAST
        classes = np.where(np.isnan(scores), unscored, SCORED).astype(np.int8)
        for kind, units in ((FIRST, self.first), (PROTECTED, self.protected), (EARLIER, self.removed)):
            classes[units.get(group.name, [])] = kind
        return classes, scores, draws

    def order(self, group: PruningGroup, values: np.ndarray | None) -> np.ndarray:
        """Unit ids in the order of removal, (n,) int64."""
        classes, scores, draws = self.keys(group, values)
        return np.lexsort((draws, -scores if self.mode == "high" else scores, classes))


def select(
    groups: Sequence[PruningGroup],
    scores: pd.Series | None,
    kept: Mapping[str, int],
    mode: Mode = "low",
    seed: int = 0,
    protected: Units | None = None,
    first: Units | None = None,
    removed: Units | None = None,
    nan_policy: NanPolicy = "drop",
) -> dict[str, list[int]]:
    """The units to remove so that ``kept[group]`` stay: {group: ascending ids}, for groups that lose units.

    scores: index (group, unit), high means keep; mode ``random`` reads none. A group that ``kept`` does not name loses nothing.
    The constraints are those of ``Rules``; units of an earlier plan (``removed``) are included in the result. Ties are broken by
    a permutation determined by the seed and the group's name.
    Raises ValueError for scores that do not cover a group, an unknown name, or a count that the constraints do not allow.
    """
    rules = Rules.of(groups, mode, seed, nan_policy, protected, first, removed)
    _known(groups, kept, "kept")
    losing = [group for group in groups if kept.get(group.name, group.n) != group.n or len(rules.removed.get(group.name, ()))]
    values = {} if mode == "random" else by_group(losing, scores)
    chosen = {}
    for group in losing:
        count = group.n - kept.get(group.name, group.n)
        _check_count(group, count, rules)
        chosen[group.name] = np.sort(rules.order(group, values.get(group.name))[:count]).tolist()
    return chosen


def ties(
    groups: Sequence[PruningGroup],
    scores: pd.Series | None,
    chosen: Mapping[str, Sequence[int]],
    mode: Mode = "low",
    seed: int = 0,
    protected: Units | None = None,
    removed: Units | None = None,
    nan_policy: NanPolicy = "drop",
) -> dict[str, int]:
    """{group: units of one score, or without a score, of which some are removed and some are kept, as the permutation decides}.

    chosen: the result of ``select`` with the same arguments. Groups whose cut lies between two scores are left out.
    """
    if mode == "random":
        return {}
    rules = Rules.of(groups, mode, seed, nan_policy, protected, None, removed)
    losing = [group for group in groups if 0 < len(chosen.get(group.name, ())) < group.n]
    found, values_of = {}, by_group(losing, scores)
    for group in losing:
        name, values = group.name, values_of[group.name]
        classes, score, _ = rules.keys(group, values)
        last, kept = rules.order(group, values)[len(chosen[name]) - 1 :][:2]
        same = (classes == classes[last]) & ((score == score[last]) | (np.isnan(score) & np.isnan(score[last])))
        if same[kept]:
            found[name] = int(same.sum())
    return found


def by_group(groups: Sequence[PruningGroup], scores: pd.Series | None) -> dict[str, np.ndarray]:
    """The scores of each group, by unit, (n,) float64. Raises ValueError unless every unit of a group has exactly one row."""
    if not groups:
        return {}
    if scores is None or scores.index.nlevels != 2:
        raise ValueError("scores are a series with the index (group, unit), one row per unit; only mode random reads none")
    index = scores.index
    codes = np.asarray(index.codes[0])
    order = np.argsort(codes, kind="stable")
    ends = np.searchsorted(codes[order], np.arange(len(index.levels[0]) + 1))
    units, values = index.get_level_values(1).to_numpy()[order], scores.to_numpy(dtype=np.float64)[order]
    code = {name: k for k, name in enumerate(index.levels[0])}
    by_name = {}
    for group in groups:
        k = code.get(group.name)
        rows = slice(0, 0) if k is None else slice(ends[k], ends[k + 1])
        if not np.array_equal(np.sort(units[rows]), np.arange(group.n)):
            raise ValueError(
                f"group {group.name!r} has the units 0 to {group.n - 1}, the scores have {len(units[rows])} rows for it: "
                "give one row per unit, NaN where there is no score"
            )
        by_name[group.name] = np.empty(group.n)
        by_name[group.name][units[rows]] = values[rows]
    return by_name


def _ids(groups: Sequence[PruningGroup], units: Units, what: str) -> dict[str, np.ndarray]:
    _known(groups, units, what)
    sizes = {group.name: group.n for group in groups}
    sorted_ids = {name: np.unique(np.array(list(ids), dtype=np.int64)) for name, ids in units.items()}
    for name, ids in sorted_ids.items():
        if len(ids) and not 0 <= ids[0] <= ids[-1] < sizes[name]:
            outside = int(ids[0] if ids[0] < 0 else ids[-1])
            raise ValueError(f"{what} names unit {outside} of group {name!r}, which has the units 0 to {sizes[name] - 1}")
    return sorted_ids


def _known(groups: Sequence[PruningGroup], named: Iterable[str], what: str) -> None:
    names = [group.name for group in groups]
    unknown = sorted(set(named) - set(names))
    if unknown:
        raise ValueError(f"{what} names the group {unknown[0]!r}.{nearest(unknown[0], names)} There are {listed(names)}")


def _check_count(group: PruningGroup, count: int, rules: Rules) -> None:
    protected, before = len(rules.protected.get(group.name, ())), len(rules.removed.get(group.name, ()))
    asked = f"group {group.name!r}: {count} of {group.n} units are to be removed"
    if not 0 <= count < group.n:
        raise ValueError(f"group {group.name!r} has {group.n} units, kept says {group.n - count}: give 1 to {group.n}")
    if count > group.n - protected:
        raise ValueError(f"{asked}, but {protected} are protected")
    if count < before:
        raise ValueError(f"{asked}, but an earlier plan has removed {before}")
