"""How many units each group keeps to meet a budget of units, parameters or multiply-accumulates (MACs)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd

from nodelens.network.groups import PruningGroup

from .densities import RemovalCurve, Shapes, erk, ranked, scopes_of, shares_of
from .ladder import Ladder
from .selection import Mode, NanPolicy, Rules, Units, by_group

Kind = Literal["uniform", "global", "isomorphic", "lamp", "erk", "dict"]
Normalize = Literal["raw", "mean", "z", "robust_z", "l2", "sum", "rank", "minmax", "lamp"]
Budget = Literal["units", "params", "macs"]
Price = Callable[[Mapping[str, int]], float]  # {group: kept units} -> parameters, or MACs, of the whole model

_RESOLUTION = 2**44  # steps between 0 and 1 in the bisection for the share
_RANKED = ("global", "isomorphic", "lamp")


@dataclass(frozen=True)
class Allocation:
    """How a budget is divided among the groups.

    kind: ``uniform`` removes the same share of every group; ``global`` the lowest normalized scores of all groups together;
    ``isomorphic`` the same share of every set of groups with the same structure, the lowest scores within it (Fang et al. 2024,
    arXiv:2407.04616); ``lamp`` the counts that LAMP scores give in mode low, whatever then selects the units (Lee et al. 2021,
    arXiv:2010.07611); ``erk`` keeps shares by the weight's shape (Evci et al. 2020, arXiv:1911.11134); ``dict`` removes in
    proportion to ``shares``, {name, pattern or kind of a group: share to remove}, or exactly these shares if no amount is given.
    normalize: how scores of different groups are made comparable (``global``, ``isomorphic``); see ``densities.NORMALIZERS``.
    per_cost: divide the scores by the cost of one unit in the dense model; scores may then not be negative.
    min_keep: the smallest number of units that stay in every group. max_remove: the largest share of a group that is removed.
    multiple: kept counts are multiples of this number, instead of the group's own.
    Raises ValueError for an unknown option value or a number out of range.
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
            raise ValueError(f"allocation {self.kind!r} has shares {self.shares}: dict needs shares, the others do not read them")
        if self.per_cost and self.kind not in _RANKED:
            raise ValueError(f"allocation {self.kind!r} does not compare scores: use per_cost with {', '.join(_RANKED)}")
        if self.min_keep < 1 or (self.multiple is not None and self.multiple < 1):
            raise ValueError(f"min_keep is {self.min_keep}, multiple {self.multiple}: both have to be at least 1")
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
    nan_policy: NanPolicy = "drop",
    shapes: Shapes | None = None,
    unit_price: Price | None = None,
) -> dict[str, int]:
    """{group: kept units} such that ``amount`` of the groups' units, or of the model's parameters or MACs, is removed.

    scores: index (group, unit), high means keep; read by global, isomorphic and lamp only. In mode ``random`` seeded draws
    replace them, except in lamp, whose counts do not depend on the mode. price: required for the budgets params and macs and
    for ``per_cost``; unit_price: the price for ``per_cost``, if it differs from ``price``. shapes: read by erk.
    Constraints as in ``select``; groups with the same ``equal_count`` keep the same count.

    The number of removed units is exact: floor(amount N + 1/2) of N. With ``uniform`` every group is also within one unit of its
    share, and other groups do not compensate for one that is too narrow to leave ``min_keep``. Parameters and MACs are within half
    the cost of the most expensive unit. For multiples and equal counts the same bounds hold per step, the units that such groups
    can only lose at once (with ``uniform``, half a step in each such group); a group narrower than its multiple keeps all units.
    An earlier plan (``removed``) stays, even if it has removed more than ``amount``.
    Raises ValueError for an amount outside [0, 1), an amount that floors, caps and protected units make impossible (the message
    states the largest possible one), or a missing price, score or shape.
    """
    allocation = allocation or Allocation()
    _check(amount, budget, allocation, price, unit_price)
    rules = Rules.of(groups, mode, seed, nan_policy, protected, first, removed)
    ladder = Ladder.of(groups, rules, allocation.min_keep, allocation.max_remove, allocation.multiple)
    if amount is None:
        return ladder.kept(_explicit(ladder, groups, allocation))
    target = _target(ladder, amount, budget, price)
    if allocation.kind == "uniform" and budget == "units":
        return ladder.kept(_same_share(ladder, amount, allocation.min_keep))
    curve = _curve(groups, scores, allocation, rules, ladder, shapes, unit_price or price)
    return ladder.kept(_solved(ladder, curve, target, f"amount {amount} of the {budget}"))


def _same_share(ladder: Ladder, amount: float, min_keep: int) -> np.ndarray:
    """The same share of every group; multiples are rounded to the nearest, and the sum over the other groups is exact."""
    free = (ladder.step == 1) & (ladder.members == 1)
    rungs = ladder.nearest(ladder.n * amount)
    asked = np.minimum(ladder.width * amount, np.maximum(0, ladder.width - min_keep))
    lost = math.floor(float(asked[free].sum()) + 0.5) + ladder.members[~free] @ ladder.lost(rungs)[~free]
    units = int(ladder.n.sum())
    target = _Target(ladder.left, units, units - float(lost))

    def curve(share: float) -> np.ndarray:
        return ladder.n * np.where(free[ladder.bundle], share, amount)

    return _solved(ladder, curve, target, f"amount {amount} of the units")


class _Target(NamedTuple):
    cost: Callable[[np.ndarray], float]  # rungs -> remaining cost
    dense: float
    left: float  # remaining cost to reach


def _target(ladder: Ladder, amount: float, budget: Budget, price: Price | None) -> _Target:
    if price is None or budget == "units":
        units = int(ladder.n.sum())
        return _Target(ladder.left, units, units - math.floor(amount * units + 0.5))
    dense = price(dict(zip(ladder.names, ladder.n.tolist(), strict=True)))
    if dense <= 0:
        raise ValueError(f"the dense model has {dense:g} {budget}: nothing to take a share of")
    return _Target(lambda rungs: price(ladder.kept(rungs)), dense, dense - amount * dense)


def _explicit(ladder: Ladder, groups: Sequence[PruningGroup], allocation: Allocation) -> np.ndarray:
    """The rungs of the given shares, without an amount."""
    asked = ladder.n * shares_of(groups, allocation.shares or {})
    rungs, wanted = ladder.nearest(asked), ladder.rounded(asked, allocation.min_keep)
    for k in np.flatnonzero(ladder.unmet(rungs, wanted)):
        name, least, most = ladder.names[ladder.bundle.tolist().index(k)], ladder.removed[k], ladder.lost(ladder.rungs)[k]
        raise ValueError(
            f"shares remove {wanted[k]} of the {ladder.width[k]} units of group {name!r}; an earlier plan, max_remove, multiples "
            f"and protected units allow {least} to {most}"
        )
    return rungs


def _curve(
    groups: Sequence[PruningGroup],
    scores: pd.Series | None,
    allocation: Allocation,
    rules: Rules,
    ladder: Ladder,
    shapes: Shapes | None,
    price: Price | None,
) -> RemovalCurve:
    n, kind = ladder.n, allocation.kind
    if kind == "erk":
        return erk(groups, shapes)
    if kind not in _RANKED:
        shares = shares_of(groups, allocation.shares) if allocation.shares is not None else np.ones(len(n))
        return lambda share: n * shares * (share / shares[shares > 0].min())
    rules = replace(rules, mode="low") if kind == "lamp" else rules
    values = {} if rules.mode == "random" else by_group(groups, scores)
    most = ladder.lost(ladder.rungs)[ladder.bundle]
    prices = _unit_prices(ladder, price) if allocation.per_cost and price else None
    scopes = scopes_of(groups, shapes) if kind == "isomorphic" else None
    return ranked(groups, values, rules, most, "lamp" if kind == "lamp" else allocation.normalize, prices, scopes)


def _unit_prices(ladder: Ladder, price: Price) -> np.ndarray:
    """The cost of one unit of each group while all others stay, (groups,); 1 for a group of one unit."""
    prices, dense = np.ones(len(ladder.width)), price(dict(zip(ladder.names, ladder.n.tolist(), strict=True)))
    for k in np.flatnonzero(ladder.width > 1):
        fewer = ladder.n - (ladder.bundle == k)
        prices[k] = (dense - price(dict(zip(ladder.names, fewer.tolist(), strict=True)))) / ladder.members[k]
        if prices[k] <= 0:
            name = ladder.names[ladder.bundle.tolist().index(k)]
            raise ValueError(f"a unit of group {name!r} costs {prices[k]:g}: per_cost needs a price above zero")
    return prices[ladder.bundle]


def _solved(ladder: Ladder, curve: RemovalCurve, target: _Target, asked: str) -> np.ndarray:
    """The rungs at the share that meets the budget; of bundles that step at this share, as many step as come nearest to it."""
    low, high = ladder.nearest(curve(0.0)), ladder.nearest(curve(1.0))
    if target.cost(low) <= target.left:
        return low
    if target.cost(high) > target.left:
        _check_feasible(high, target, asked)
        return high
    few, many = 0, _RESOLUTION
    while many - few > 1 and (high - low).sum() > 1:
        middle = (few + many) // 2
        rungs = ladder.nearest(curve(middle / _RESOLUTION))
        if target.cost(rungs) > target.left:
            few, low = middle, rungs
        else:
            many, high = middle, rungs
    steps = np.repeat(np.arange(len(low)), high - low)
    few, many = 0, len(steps)
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if target.cost(_with_steps(low, steps[:middle])) > target.left else (few, middle)
    before, after = _with_steps(low, steps[:few]), _with_steps(low, steps[:many])
    return before if target.cost(before) - target.left < target.left - target.cost(after) else after


def _with_steps(rungs: np.ndarray, steps: np.ndarray) -> np.ndarray:
    return rungs + np.bincount(steps, minlength=len(rungs))


def _check_feasible(rungs: np.ndarray, target: _Target, asked: str) -> None:
    """Raises ValueError if the largest possible removal misses the budget by more than half a step."""
    left = target.cost(rungs)
    steps = [target.cost(rungs - (np.arange(len(rungs)) == k)) - left for k in np.flatnonzero(rungs)]
    if left - target.left > max(steps, default=0.0) / 2:
        largest = math.floor((1 - left / target.dense) * 1e6 + 1e-3) / 1e6
        raise ValueError(
            f"{asked} cannot be removed: floors, caps, multiples and protected units allow an amount of {largest} at most"
        )


def _check(amount: float | None, budget: str, allocation: Allocation, price: Price | None, unit_price: Price | None) -> None:
    if amount is None and allocation.kind != "dict":
        raise ValueError(f"allocation {allocation.kind!r} needs an amount; only dict can do without")
    if amount is not None and not 0 <= amount < 1:
        raise ValueError(f"amount is {amount}: a share of the {budget} to remove, from 0 up to but not including 1")
    if budget not in get_args(Budget):
        raise ValueError(f"budget is {budget!r}; there are {', '.join(get_args(Budget))}")
    if amount is not None and budget != "units" and price is None:
        raise ValueError(f"a budget of {budget} needs price=, a function from {{group: kept units}} to the model's {budget}")
    if allocation.per_cost and not (unit_price or (price and budget in ("units", allocation.per_cost))):
        raise ValueError(f"per_cost={allocation.per_cost} with a budget of {budget} needs unit_price=")
