"""Criteria: weighted combinations of metric columns. Units with high scores are kept."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch

from nodelens.messages import kind_of, nearest
from nodelens.metrics.supernode import largest, share_of
from nodelens.results.result import values_of
from nodelens.statistics.sample_hash import generator

from .type_rules import TypeRules

RANDOM = "random"
Normalize = Literal["none", "rank", "minmax", "z", "robust_z", "mean", "l2", "sum"]
Transform = Literal["none", "log", "sqrt", "abs", "rank"]
Spec = str | Mapping[str, Any]
_LONG = ("terms", "normalize", "combine", "protect", "types")


@dataclass(frozen=True)
class Term:
    """A column's part in a criterion. A negative weight means that large values are not worth keeping."""

    weight: float = 1.0
    transform: Transform = "none"


@dataclass(frozen=True)
class Criterion:
    """score(u) = sum over terms of weight N(T(u)), or, with ``combine: product``, the product of T(u)^weight, T >= 0.

    T is a column of the score table, N a normalisation within each group. The default is ``rank``, from 0 (smallest) to 1 with ties
    averaged, because a sum of quantities in different units would follow the one with the widest range; it is ``none`` for a single
    term. protect: {column: share}: units with the largest values of a column are never removed, at least one per group.
    types: how many units of each type are removed, by the labels in a table of units. A term is a weight, {weight, transform} or a
    ``Term``. Raises ValueError for anything else, no term, an unknown normalisation, and a share outside of (0, 1).
    """

    name: str
    terms: Mapping[str, Term]
    normalize: Normalize = "rank"
    combine: Literal["sum", "product"] = "sum"
    protect: Mapping[str, float] = field(default_factory=dict)
    types: TypeRules | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.terms, Mapping) or not self.terms:
            raise ValueError(f"criterion {self.name!r} has no term: it is a metric's name, or weights by name, as {{taylor: 1.0}}")
        terms = {column: _term(self.name, column, value) for column, value in self.terms.items()}
        object.__setattr__(self, "terms", terms)
        for what, allowed in (("normalize", get_args(Normalize)), ("combine", ("sum", "product"))):
            if getattr(self, what) not in allowed:
                raise ValueError(f"criterion {self.name!r}: {what} is {getattr(self, what)!r}; it is {', '.join(allowed)}")
        for column, share in self.protect.items():
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
                raise ValueError(
                    f"criterion {self.name!r}: protect.{column} is {share!r}; it is a share of a group, between 0 and 1"
                )

    @classmethod
    def of(cls, spec: "Spec | Criterion", name: str | None = None) -> "Criterion":
        """A criterion from a column's name, ``{column: weight}``, or the long form {terms, normalize, combine, protect, types}.

        A term of the long form is a weight or {weight, transform}. Raises ValueError for anything else,
        and TypeError for what is no criterion at all.
        """
        if isinstance(spec, Criterion):
            return spec
        if isinstance(spec, str):
            return cls(name or spec, {spec: Term()}, "none")
        if not isinstance(spec, Mapping):
            way = f"give an object, {spec.__name__}()" if isinstance(spec, type) else "it is a metric's name, or weights by name"
            raise TypeError(f"criterion is {kind_of(spec)}; {way}")
        spec = renamed(spec, {"normalise": "normalize"})
        long = "terms" in spec
        title = name or "+".join(spec["terms"] if long else spec)
        if long and (unknown := sorted(set(spec) - set(_LONG))):
            near = nearest(unknown[0], _LONG)
            raise ValueError(f"criterion {title!r} has {', '.join(unknown)}; it takes {', '.join(_LONG)}.{near}")
        given = spec["terms"] if long else spec
        single = isinstance(given, Mapping) and len(given) == 1
        options: dict[str, Any] = {"normalize": "none" if single else "rank", "combine": "sum"}
        options |= {k: spec[k] for k in options if k in spec} if long else {}
        protect = dict(spec.get("protect") or {}) if long else {}
        types = TypeRules.of(title, spec["types"]) if long and spec.get("types") is not None else None
        return cls(title, given, **options, protect=protect, types=types)

    @property
    def spec(self) -> dict[str, Any]:
        """The long form, as plain values."""
        terms = {
            k: t.weight if t.transform == "none" else {"weight": t.weight, "transform": t.transform} for k, t in self.terms.items()
        }
        protect = {"protect": dict(self.protect)} if self.protect else {}
        types = {"types": self.types.spec} if self.types else {}
        return {"terms": terms, "normalize": self.normalize, "combine": self.combine, **protect, **types}

    @property
    def columns(self) -> list[str]:
        """The columns that the criterion reads."""
        return list(dict.fromkeys([*self.terms, *self.protect]))

    def protected(self, table: pd.DataFrame) -> dict[str, list[int]]:
        """{group: ids of the protected units}."""
        found: dict[str, list[int]] = {}
        for column, share in self.protect.items():
            for group, values in table[column].groupby(level="group", sort=False):
                best = largest(torch.tensor(values.to_numpy(float)), share_of(len(values), share))
                found[str(group)] = sorted({*found.get(str(group), ()), *best.tolist()})
        return found

    def score(self, table: pd.DataFrame, seed: int = 0) -> pd.Series:
        """One score per unit of a table with index (group, unit); NaN if a term is NaN.

        ``random`` is drawn separately for each seed and group. Raises ValueError for a missing column, a product with terms below
        0, and a group whose scores are all NaN.
        """
        missing = [column for column in self.columns if column != RANDOM and column not in table]
        if missing:
            there = ", ".join(values_of(table)) or "none"
            raise ValueError(f"criterion {self.name!r} reads {', '.join(missing)}; the table has {there}")
        parts = []
        for column, term in self.terms.items():
            values = random_scores(table.index, seed) if column == RANDOM else table[column].astype(float)
            values = _transformed(values, term.transform)
            if self.combine == "product":
                parts.append(self._power(column, values, term.weight))
            else:
                parts.append(normalized(values, self.normalize) * term.weight)
        total = sum(parts[1:], parts[0])
        total = np.exp(total) if self.combine == "product" else total
        return self._checked(total)

    def _power(self, column: str, values: pd.Series, weight: float) -> pd.Series:
        """The logarithm of a column to the power of its weight; -inf where the column is 0."""
        if bool((values < 0).any()) or (weight < 0 and bool((values == 0).any())):
            least = "below 0" if bool((values < 0).any()) else "of 0, and a weight below 0"
            raise ValueError(f"criterion {self.name!r} multiplies, and {column} has values {least}: use combine: sum")
        with np.errstate(divide="ignore"):
            return np.log(values) * weight if weight else values * 0.0

    def _checked(self, score: pd.Series) -> pd.Series:
        found = score.groupby(level="group", sort=False).count()
        empty = list(found.index[found == 0])
        if empty:
            raise ValueError(
                f"criterion {self.name!r} has no number for any unit of {', '.join(map(str, empty[:4]))}"
                + (f" and {len(empty) - 4} more groups" if len(empty) > 4 else "")
                + ": choose another, or leave them out with freeze="
            )
        return score.rename(self.name)


def normalized(values: pd.Series, how: Normalize) -> pd.Series:
    """Values normalised within each group: ranks or min-max from 0 to 1, deviations in units of spread, or multiples of a size.

    ``z``, ``robust_z`` and ``minmax`` are 0 in a group whose units are equal.
    """
    by = values.groupby(level="group", sort=False)
    if how == "none":
        return values
    if how == "rank":
        return ((by.rank() - 1) / (by.transform("count") - 1).clip(lower=1)).where(values.notna())
    if how in ("mean", "l2", "sum"):
        size = {"mean": lambda x: x.mean(), "l2": lambda x: np.sqrt((x**2).sum()), "sum": lambda x: x.sum()}[how]
        return values / by.transform(size).where(lambda s: s != 0, 1.0)
    if how == "minmax":
        low, spread = by.transform("min"), by.transform("max") - by.transform("min")
    elif how == "z":
        low, spread = by.transform("mean"), by.transform("std", ddof=0)
    else:
        low = by.transform("median")
        spread = (values - low).abs().groupby(level="group", sort=False).transform("median")
    return (values - low) / spread.where(spread != 0, 1.0)


def random_scores(index: pd.Index, seed: int) -> pd.Series:
    """Uniform scores in [0, 1), drawn by a separate generator for each seed and group."""
    drawn = pd.Series(0.0, index=index)
    for group, rows in drawn.groupby(level="group", sort=False):
        drawn.loc[rows.index] = torch.rand(len(rows), generator=generator(seed, str(group)), dtype=torch.float64).numpy()
    return drawn


def renamed(spec: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A spec with deprecated keys renamed, each with a DeprecationWarning."""
    for old in names.keys() & spec.keys():
        warnings.warn(
            f"{old} is now called {names[old]}; the old name goes with the next version", DeprecationWarning, stacklevel=4
        )
    return {names.get(key, key): value for key, value in spec.items()}


def _term(criterion: str, column: str, value: Any) -> Term:
    if isinstance(value, Term):
        value = {"weight": value.weight, "transform": value.transform}
    elif isinstance(value, Mapping):
        value = renamed(value, {"through": "transform"})
    if isinstance(value, Mapping) and "weight" in value and not set(value) - {"weight", "transform"}:
        weight, transform = value["weight"], value.get("transform", "none")
    else:
        weight, transform = value, "none"
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise ValueError(f"criterion {criterion!r}: {column} is {weight!r}; it is a weight, a number, or {{weight, transform}}")
    if transform not in get_args(Transform):
        raise ValueError(f"criterion {criterion!r}: transform of {column} is {transform!r}; it is {', '.join(get_args(Transform))}")
    return Term(float(weight), transform)


def _transformed(values: pd.Series, how: Transform) -> pd.Series:
    if how == "rank":
        return normalized(values, "rank")
    function = {"log": np.log, "sqrt": np.sqrt, "abs": np.abs}.get(how)
    with np.errstate(divide="ignore", invalid="ignore"):
        return values if function is None else function(values)
