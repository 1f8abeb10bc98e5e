"""How many units each group keeps, so that a budget of units, parameters or multiplications holds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd

from nodelens.network.groups import PruningGroup

from .densities import Shapes, Wish, erk, ranked, scopes_of, shares_of
from .ladder import Ladder
from .selection import Mode, Nan, Rules, Units, by_group

Kind = Literal["uniform", "global", "isomorphic", "lamp", "erk", "dict"]
Normalize = Literal["raw", "mean", "z", "robust_z", "l2", "sum", "rank", "minmax", "lamp"]
Budget = Literal["units", "params", "macs"]
Price = Callable[[Mapping[str, int]], float]  # {group: kept units} -> parameters, or multiplications, of the whole model

_FINE = 2**44  # steps in which a share is solved for
_RANKED = ("global", "isomorphic", "lamp")


@dataclass(frozen=True)
class Allocation:
    """How a budget is divided over the groups.

    kind: ``uniform`` the same share of every group; ``global`` the lowest normalized scores, wherever they are;
    ``isomorphic`` the same share of every scope of groups built alike, the lowest scores within it (Fang et al. 2024,
    arXiv:2407.04616); ``lamp`` the counts that lamp scores imply in mode low, whatever then chooses the units (Lee et al. 2021,
    arXiv:2010.07611); ``erk`` kept shares by the weight's shape (Evci et al. 2020, arXiv:1911.11134); ``dict`` in the
    proportion of ``shares``, {name, pattern or kind of a group: share to remove}, or literally where no amount is asked.
    normalize: what makes scores of several groups comparable, for ``global`` and ``isomorphic``; see ``densities.NORMALIZERS``.
    per_cost: divide them by what a unit of the dense model costs; then none may be negative.
    min_keep: units that stay in every group. max_remove: the largest share of a group that may go. multiple: of which kept
    counts have to be, instead of each group's own.
    Raises ValueError for an unknown word or a number out of range.
    """

    kind: Kind = "uniform"
    normalize: Normalize = "mean"
    per_cost: Literal["params", "macs"] | None = None
    shares: Mapping[str, float] | None = None
    min_keep: int = 1
    max_remove: float = 1.0
    multiple: int | None = None

    def __post_init__(self) -> None:
        words_of = {"kind": get_args(Kind), "normalize": get_args(Normalize), "per_cost": (None, "params", "macs")}
        for field, words in words_of.items():
            if getattr(self, field) not in words:
                raise ValueError(f"allocation.{field} is {getattr(self, field)!r}; there are {', '.join(map(str, words))}")
        if (self.kind == "dict") != (self.shares is not None):
            raise ValueError(f"allocation {self.kind!r} with shares {self.shares}: dict needs shares, the others read none")
        if self.per_cost and self.kind not in _RANKED:
            raise ValueError(f"allocation {self.kind!r} compares no scores: per_cost goes with {', '.join(_RANKED)}")
        if self.min_keep < 1 or (self.multiple is not None and self.multiple < 1):
            raise ValueError(f"min_keep is {self.min_keep}, multiple {self.multiple}: both are at least 1")
        if not 0 <= self.max_remove <= 1:
            raise ValueError(f"max_remove is {self.max_remove}: a share of a group, from 0 to 1")


def allocate(
    groups: Sequence[PruningGroup],
    scores: pd.Series | None,
    amount: float | None,
    budget: Budget = "units",
    allocation: Allocation | None = None,
    price: Price | None = None,
    protected: Units | None = None,
    first: Units | None = None,
    mode: Mode = "low",
    seed: int = 0,
    *,
    removed: Units | None = None,
    nan: Nan = "remove",
    shapes: Shapes | None = None,
    unit_price: Price | None = None,
) -> dict[str, int]:
    """{group: kept units}, so that ``amount`` of the units in the groups, or of the model's parameters or multiplications, go.

    scores: index (group, unit), high means keep; read by global, isomorphic and lamp only. In mode ``random`` seeded draws
    stand in for them, but in lamp, whose counts do not depend on the mode. price: needed for the budgets params and macs and
    for ``per_cost``; unit_price: what ``per_cost`` divides by, where that is not ``price``. shapes: what erk reads.
    Constraints as in ``select``; groups that belong ``together`` keep the same count.

    Removed units are exact: floor(amount N + 1/2) of N; of ``uniform`` each group is within one unit of its share besides, and what
    a group too narrow to leave ``min_keep`` cannot give, the others do not make up for. Parameters and multiplications are off by
    at most half the dearest unit. Where kept counts are multiples, or groups belong together, read for a unit a step: the units
    that such groups can only lose at once (of ``uniform`` half a step in each such group); a group narrower than its multiple keeps
    all. An earlier plan (``removed``) that has taken more than ``amount`` stays.
    Raises ValueError for an amount outside [0, 1), one that floors, caps and protected units make impossible (it states the
    largest possible), or a missing price, score or shape.
    """
    allocation = allocation or Allocation()
    _check(amount, budget, allocation, price, unit_price)
    rules = Rules.of(groups, mode, seed, nan, protected, first, removed)
    ladder = Ladder.of(groups, rules, allocation.min_keep, allocation.max_remove, allocation.multiple)
    if amount is None:
        return ladder.kept(_literal(ladder, groups, allocation))
    goal = _goal(ladder, amount, budget, price)
    if allocation.kind == "uniform" and budget == "units":
        return ladder.kept(_same_share(ladder, amount, allocation.min_keep))
    wish = _wish(groups, scores, allocation, rules, ladder, shapes, unit_price or price)
    return ladder.kept(_solved(ladder, wish, goal, f"amount {amount} of the {budget}"))


def _same_share(ladder: Ladder, amount: float, min_keep: int) -> np.ndarray:
    """The same share of every group: to the nearest of kept multiples; of the others so that their sum is exact."""
    free = (ladder.step == 1) & (ladder.members == 1)
    rungs = ladder.nearest(ladder.n * amount)
    asked = np.minimum(ladder.width * amount, np.maximum(0, ladder.width - min_keep))
    lost = math.floor(float(asked[free].sum()) + 0.5) + ladder.members[~free] @ ladder.lost(rungs)[~free]
    units = int(ladder.n.sum())
    goal = _Goal(ladder.left, units, units - float(lost))

    def wish(share: float) -> np.ndarray:
        return ladder.n * np.where(free[ladder.rung_group], share, amount)

    return _solved(ladder, wish, goal, f"amount {amount} of the units")


class _Goal(NamedTuple):
    cost: Callable[[np.ndarray], float]  # rungs -> what is left
    dense: float
    left: float  # what should be


def _goal(ladder: Ladder, amount: float, budget: Budget, price: Price | None) -> _Goal:
    if price is None or budget == "units":
        units = int(ladder.n.sum())
        return _Goal(ladder.left, units, units - math.floor(amount * units + 0.5))
    dense = price(dict(zip(ladder.names, ladder.n.tolist(), strict=True)))
    if dense <= 0:
        raise ValueError(f"the dense model has {dense:g} {budget}: nothing to take a share of")
    return _Goal(lambda rungs: price(ladder.kept(rungs)), dense, dense - amount * dense)


def _literal(ladder: Ladder, groups: Sequence[PruningGroup], allocation: Allocation) -> np.ndarray:
    """The rungs that shares name themselves."""
    asked = ladder.n * shares_of(groups, allocation.shares or {})
    rungs, wanted = ladder.nearest(asked), ladder.rounded(asked, allocation.min_keep)
    for k in np.flatnonzero(ladder.unmet(rungs, wanted)):
        name, least, most = ladder.names[ladder.rung_group.tolist().index(k)], ladder.gone[k], ladder.lost(ladder.rungs)[k]
        raise ValueError(
            f"shares ask for {wanted[k]} of the {ladder.width[k]} units of group {name!r}; an earlier plan, max_remove, multiples "
            f"and protected units allow {least} to {most}"
        )
    return rungs


def _wish(
    groups: Sequence[PruningGroup],
    scores: pd.Series | None,
    allocation: Allocation,
    rules: Rules,
    ladder: Ladder,
    shapes: Shapes | None,
    price: Price | None,
) -> Wish:
    n, kind = ladder.n, allocation.kind
    if kind == "erk":
        return erk(groups, shapes)
    if kind not in _RANKED:
        shares = shares_of(groups, allocation.shares) if allocation.shares is not None else np.ones(len(n))
        return lambda share: n * shares * (share / shares[shares > 0].min())
    rules = replace(rules, mode="low") if kind == "lamp" else rules
    values = {} if rules.mode == "random" else by_group(groups, scores)
    most = ladder.lost(ladder.rungs)[ladder.rung_group]
    prices = _unit_prices(ladder, price) if allocation.per_cost and price else None
    scopes = scopes_of(groups, shapes) if kind == "isomorphic" else None
    return ranked(groups, values, rules, most, "lamp" if kind == "lamp" else allocation.normalize, prices, scopes)


def _unit_prices(ladder: Ladder, price: Price) -> np.ndarray:
    """What a unit of each group costs while all others stay, (groups,); 1 where there is but one."""
    prices, dense = np.ones(len(ladder.width)), price(dict(zip(ladder.names, ladder.n.tolist(), strict=True)))
    for k in np.flatnonzero(ladder.width > 1):
        fewer = ladder.n - (ladder.rung_group == k)
        prices[k] = (dense - price(dict(zip(ladder.names, fewer.tolist(), strict=True)))) / ladder.members[k]
        if prices[k] <= 0:
            name = ladder.names[ladder.rung_group.tolist().index(k)]
            raise ValueError(f"a unit of group {name!r} costs {prices[k]:g}: per_cost divides by a price above zero")
    return prices[ladder.rung_group]


def _solved(ladder: Ladder, wish: Wish, goal: _Goal, asked: str) -> np.ndarray:
    """The rungs at the share where the budget holds; of what steps at that very share, as much as comes nearest to it."""
    low, high = ladder.nearest(wish(0.0)), ladder.nearest(wish(1.0))
    if goal.cost(low) <= goal.left:
        return low
    if goal.cost(high) > goal.left:
        _check_reach(high, goal, asked)
        return high
    few, many = 0, _FINE
    while many - few > 1 and (high - low).sum() > 1:
        middle = (few + many) // 2
        rungs = ladder.nearest(wish(middle / _FINE))
        if goal.cost(rungs) > goal.left:
            few, low = middle, rungs
        else:
            many, high = middle, rungs
    steps = np.repeat(np.arange(len(low)), high - low)
    few, many = 0, len(steps)
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if goal.cost(_stepped(low, steps[:middle])) > goal.left else (few, middle)
    before, after = _stepped(low, steps[:few]), _stepped(low, steps[:many])
    return before if goal.cost(before) - goal.left < goal.left - goal.cost(after) else after


def _stepped(rungs: np.ndarray, steps: np.ndarray) -> np.ndarray:
    return rungs + np.bincount(steps, minlength=len(rungs))


def _check_reach(rungs: np.ndarray, goal: _Goal, asked: str) -> None:
    """Raises ValueError where all that can go leaves more than half a step too much."""
    left = goal.cost(rungs)
    steps = [goal.cost(rungs - (np.arange(len(rungs)) == k)) - left for k in np.flatnonzero(rungs)]
    if left - goal.left > max(steps, default=0.0) / 2:
        largest = math.floor((1 - left / goal.dense) * 1e6 + 1e-3) / 1e6
        raise ValueError(f"{asked} cannot go: floors, caps, multiples and protected units allow an amount of {largest} at most")


def _check(amount: float | None, budget: str, allocation: Allocation, price: Price | None, unit_price: Price | None) -> None:
    if amount is None and allocation.kind != "dict":
        raise ValueError(f"allocation {allocation.kind!r} needs an amount; only dict says shares of its own")
    if amount is not None and not 0 <= amount < 1:
        raise ValueError(f"amount is {amount}: a share of the {budget} to remove, from 0 up to but not including 1")
    if budget not in get_args(Budget):
        raise ValueError(f"budget is {budget!r}; there are {', '.join(get_args(Budget))}")
    if amount is not None and budget != "units" and price is None:
        raise ValueError(f"a budget of {budget} needs a price: kept units by group -> {budget} of the model")
    if allocation.per_cost and not (unit_price or (price and budget in ("units", allocation.per_cost))):
        raise ValueError(f"per_cost={allocation.per_cost} with a budget of {budget} needs a unit_price of its own")
