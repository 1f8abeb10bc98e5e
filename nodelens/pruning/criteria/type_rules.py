"""Pruning by the type of a unit: rates, protected shares and an order of removal, from the labels in a table of units."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from nodelens.messages import listed, nearest
from nodelens.network.groups import PruningGroup
from nodelens.results.result import load
from nodelens.statistics.sample_hash import generator

Labels = Mapping[str, np.ndarray]  # {group: label of each unit, (units,) strings}
_KEYS = ("units", "column", "rates", "protect", "first", "permuted")


@dataclass(frozen=True, eq=False)
class TypeRules:
    """How many units of each type are removed from a group.

    units: the folder of a finished run whose table of units has the types, such as one of ``analysis=[clusters]``, the folder
    ``supernodes`` in one of ``analysis=[supernodes]``, or a table with index (layer, unit). column: the column of labels. rates:
    {type: rate}, how strongly a type is pruned: in every group, the removed shares of its types are proportional to their rates,
    until a type is used up; types that are not named have rate 1, and with rate 0 all units stay. Within a type, the scores decide.
    protect: {type: share} of a type's units, those with the highest scores, that are never removed. first: types that are removed
    before all others. permuted: the types are permuted within each group, from the seed of the pruning: a control that treats as
    many random units in the same way.
    """

    units: str | Path | pd.DataFrame
    column: str = "unit_type"
    rates: Mapping[str, float] = field(default_factory=dict)
    protect: Mapping[str, float] = field(default_factory=dict)
    first: Sequence[str] = ()
    permuted: bool = False

    @classmethod
    def of(cls, criterion: str, given: Any) -> "TypeRules":
        """From a mapping of the fields. Raises ValueError, with the criterion, for unknown keys and values out of range."""
        if isinstance(given, TypeRules):
            return given
        where = "finetune: types" if criterion == "finetune" else f"criterion {criterion!r}: types"
        if not isinstance(given, Mapping) or given.get("units") is None:
            raise ValueError(
                f"{where} needs units, the folder of a run with analysis=[clusters], <run>/supernodes, or a table of units; it is "
                f"{given!r}"
            )
        if unknown := sorted(set(given) - set(_KEYS)):
            raise ValueError(f"{where} has {', '.join(unknown)}; it takes {', '.join(_KEYS)}.{nearest(unknown[0], _KEYS)}")
        rates = {str(k): v for k, v in (given.get("rates") or {}).items()}
        protect = {str(k): v for k, v in (given.get("protect") or {}).items()}
        for name, rate in rates.items():
            if not _is_number(rate) or not 0 <= rate < math.inf:
                raise ValueError(f"{where}.rates.{name} is {rate!r}; it is a number, 0 or more")
        for name, share in protect.items():
            if not _is_number(share) or not 0 <= share <= 1:
                raise ValueError(f"{where}.protect.{name} is {share!r}; it is a share of the units of a type, from 0 to 1")
        first = given.get("first") or ()
        first = (first,) if isinstance(first, str) else tuple(map(str, first))
        permuted = given.get("permuted", False)
        if not isinstance(permuted, bool):
            raise ValueError(f"{where}.permuted is {permuted!r}; it is true or false")
        return cls(given["units"], given.get("column") or "unit_type", rates, protect, first, permuted)

    @cached_property
    def column_of_units(self) -> pd.Series:
        """The label of each unit as text, index (layer, unit). Raises ValueError for a table without the column or the index."""
        table = self.units if isinstance(self.units, pd.DataFrame) else load(self.units).units
        where = "the table of units" if isinstance(self.units, pd.DataFrame) else f"the table of units of {self.units}"
        if self.column not in table:
            raise ValueError(
                f"{where} has no column {self.column!r}.{nearest(self.column, map(str, table))} Run analyze.py with "
                "analysis=[clusters], or name the column of another label; those of supernodes are in <run>/supernodes"
            )
        if table.index.nlevels != 2:
            raise ValueError(f"{where} has no units: its index is (layer, unit)")
        return table[self.column].astype(str)

    @property
    def spec(self) -> dict[str, Any]:
        """The rules as plain values; ``labels`` is a hash of the labels."""
        column = self.column_of_units
        text = "\n".join(f"{layer} {unit} {label}" for (layer, unit), label in column.items())
        return {
            "units": "a table" if isinstance(self.units, pd.DataFrame) else str(self.units),
            "column": self.column,
            "rates": dict(self.rates),
            "protect": dict(self.protect),
            "first": list(self.first),
            "permuted": self.permuted,
            "labels": hashlib.sha256(text.encode()).hexdigest()[:16],
        }

    def labels(self, groups: Iterable[PruningGroup], seed: int = 0) -> Labels:
        """The labels of the units of each group, from the layer of the group's name or the first that makes its units.

        seed: of the permutation, where the types are ``permuted``. Raises ValueError for a group without labels, and for a type
        that no unit has.
        """
        found = {group.name: self._of(group) for group in groups}
        there = sorted({label for labels in found.values() for label in labels})
        unknown = next((name for name in (*self.rates, *self.protect, *self.first) if name not in there), None)
        if unknown is not None:
            raise ValueError(f"no unit has the {self.column} {unknown!r}.{nearest(unknown, there)} There are {', '.join(there)}")
        return {name: self._permuted(name, own, seed) for name, own in found.items()} if self.permuted else found

    def protected(self, scores: pd.Series, labels: Labels) -> dict[str, list[int]]:
        """{group: units that are never removed}: types of rate 0, and the best of each type with a protected share."""
        return {name: ids for name, every in labels.items() if (ids := self._protected(scores.loc[name].to_numpy(float), every))}

    def removed_first(self, labels: Labels) -> dict[str, list[int]]:
        """{group: units that are removed before all others}."""
        return {name: np.flatnonzero(np.isin(every, self.first)).tolist() for name, every in labels.items() if self.first}

    def paced(self, scores: pd.Series, labels: Labels, highest_first: bool = False) -> pd.Series:
        """Scores for which removing the lowest of a group removes shares of its types in proportion to their rates.

        Formula: (k - 1/2) / (n_t rate_t) for the k-th unit of type t to be removed, n_t its number of units
        NaN:     units without a score, and types of rate 0

        highest_first: within a type, units with high scores are removed first.
        """
        parts = []
        for name, every in labels.items():
            own = scores.loc[[name]]
            ranks = own.groupby(every).rank(method="first", ascending=not highest_first)
            sizes = own.groupby(every).transform("size").to_numpy(float)
            rates = np.array([float(self.rates.get(label, 1.0)) or np.nan for label in every])
            parts.append((ranks - 0.5) / (sizes * rates))
        return pd.concat(parts).rename(scores.name)

    def _protected(self, scores: np.ndarray, labels: np.ndarray) -> list[int]:
        kept: set[int] = set()
        for label in set(labels):
            units = np.flatnonzero(labels == label)
            share = 1.0 if self.rates.get(label) == 0 else self.protect.get(label, 0.0)
            best = np.argsort(-np.nan_to_num(scores[units], nan=-np.inf), kind="stable")
            kept.update(units[best[: math.floor(share * len(units) + 0.5)]].tolist())
        return sorted(kept)

    def _permuted(self, group: str, labels: np.ndarray, seed: int) -> np.ndarray:
        return labels[torch.randperm(len(labels), generator=generator(seed, "types", group)).numpy()]

    def _of(self, group: PruningGroup) -> np.ndarray:
        layers = [group.name, *dict.fromkeys(piece.module for piece in group.by_role("producer"))]
        column = self.column_of_units
        known = set(column.index.get_level_values(0))
        name = next((layer for layer in layers if layer in known), None)
        if name is None:
            raise ValueError(
                f"group {group.name!r} has no {self.column} in the table of units, which has {listed(sorted(map(str, known)))}: "
                "measure its layers, or leave it out with freeze="
            )
        own = column.loc[name]
        if sorted(own.index) != list(range(group.n)):
            raise ValueError(
                f"group {group.name!r} has {group.n} units, layer {name!r} in the table of units has {len(own)}: the types are of "
                "another network, or of another kind of units"
            )
        return own.reindex(range(group.n)).to_numpy(object)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
