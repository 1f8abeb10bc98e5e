"""What is asked for, and the plan that answers it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pandas as pd

from .allocation import Allocation, allocate
from .axis import Axes
from .compensate import Compensate, check_compensate
from .cost import Budget
from .criteria import Criterion
from .densities import shapes_of_axes
from .removal import RemovalPlan, check_removal
from .schedule import kept_shares
from .selection import Mode, select
from .subject import Subject


@dataclass(frozen=True)
class Schedule:
    """In how many steps: ``one_shot``, or ``iterative``, which measures the masked model anew before each.

    shape: how fast units go: linear, geometric or cubic (most at the start); see ``kept_shares``. Shares are of the original
    units, plans nested: what has gone stays gone. Compensation and recovery follow every step.
    """

    kind: Literal["one_shot", "iterative"] = "one_shot"
    steps: int = 1
    shape: Literal["linear", "geometric", "cubic"] = "linear"

    def __post_init__(self) -> None:
        if self.kind not in ("one_shot", "iterative"):
            raise ValueError(f"schedule.kind is {self.kind!r}; it is one_shot or iterative")
        if (self.kind == "one_shot") != (self.steps == 1):
            raise ValueError(f"schedule {self.kind!r} of {self.steps} steps: one_shot has one, iterative more")
        kept_shares(0.5, self.steps, self.shape)

    def shares(self, amount: float) -> list[float]:
        """The share that is gone after each step; the last is the amount."""
        return [*(1 - kept for kept in kept_shares(amount, self.steps, self.shape)[:-1]), amount]


@dataclass(frozen=True)
class Recipe:
    """What is asked for. amount: the share of the budget's units, parameters or MACs to remove."""

    criterion: Criterion
    amount: float
    allocation: Allocation = field(default_factory=Allocation)
    budget: Budget = "units"
    mode: Mode = "low"
    compensate: Compensate = "none"
    schedule: Schedule = field(default_factory=Schedule)
    seed: int = 0
    protect: Mapping[str, Sequence[int]] = field(default_factory=dict)
    nan: Literal["remove", "keep"] = "remove"  # units that have no score: a metric is NaN where a unit is constant

    def __post_init__(self) -> None:
        check_removal(self.amount, self.mode)
        check_compensate(self.compensate)
        if self.budget not in ("units", "params", "macs"):
            raise ValueError(f"budget is {self.budget!r}; it is units, params or macs")

    @property
    def about(self) -> dict[str, Any]:
        """Plain values, for a plan or a table."""
        return {
            "criterion": self.criterion.name,
            "terms": self.criterion.spec,
            "amount": self.amount,
            "allocation": asdict(self.allocation),
            "budget": self.budget,
            "mode": self.mode,
            "compensate": self.compensate,
            "schedule": asdict(self.schedule),
            "seed": self.seed,
            "protect": {k: list(v) for k, v in self.protect.items()},
            "nan": self.nan,
        }


def plan_removal(
    subject: Subject,
    table: pd.DataFrame,
    recipe: Recipe,
    share: float | None = None,
    removed: Mapping[str, Sequence[int]] | None = None,
) -> RemovalPlan:
    """Which units go by a table of scores, and what that achieves.

    share: of the budget, where it is not the recipe's; removed: earlier, in any case.
    """
    removed, amount = removed or {}, recipe.amount if share is None else share
    scores = recipe.criterion.score(table, recipe.seed)
    protect = _protected(subject.axes, recipe.protect)
    for name, units in recipe.criterion.protected(table).items():
        protect[name] = sorted({*protect.get(name, ()), *units} - {*removed.get(name, ())})
    budget, cost = recipe.budget, subject.cost
    keep = allocate(
        subject.axes,
        scores,
        amount,
        budget=budget,
        allocation=recipe.allocation,
        price=lambda kept: cost.price(budget, kept),
        unit_price=lambda kept: cost.price(recipe.allocation.per_cost or budget, kept),
        shapes=shapes_of_axes(subject.model, subject.axes),
        protected=protect,
        removed=removed,
        mode=recipe.mode,
        seed=recipe.seed,
        nan=recipe.nan,
    )
    chosen = select(
        subject.axes, scores, keep, mode=recipe.mode, seed=recipe.seed, nan=recipe.nan, protected=protect, removed=removed
    )
    without = {str(a): int(n) for a, n in scores.isna().groupby(level="axis").sum().items() if n}
    return RemovalPlan(chosen, {**recipe.about, "without_score": without, **achieved(subject, chosen, amount, budget)})


def achieved(subject: Subject, removed: Mapping[str, Sequence[int]], amount: float, budget: Budget) -> dict[str, Any]:
    """What a plan leaves: units, parameters, MACs, and how far it is from what was asked."""
    kept = {axis.name: axis.n - len(removed.get(axis.name, ())) for axis in subject.axes}
    cost, gone = subject.cost, sum(map(len, removed.values()))
    total = sum(axis.n for axis in subject.axes)
    found: dict[str, Any] = {"units": total, "units_removed": gone, "smallest_kept": min(kept.values())}
    for name, count in (("params", cost.params), ("macs", cost.macs)):
        dense, left = count(), count(kept)
        found |= {name: left, f"dense_{name}": dense, f"{name}_share": left / dense if dense else float("nan")}
    dense, left = (total, total - gone) if budget == "units" else (found[f"dense_{budget}"], found[budget])
    return found | {"budget_error": (dense - left) - amount * dense, "exact": all(a.exact for a in subject.axes)}


def _protected(axes: Axes, protect: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Units that stay, by axis; a pattern or kind stands for several axes."""
    found: dict[str, Sequence[int]] = {}
    for pattern, units in protect.items():
        for name in sorted(axes._matched(pattern, "protect")):
            n = axes.named(name).n
            if any(not 0 <= u < n for u in units):
                raise ValueError(f"protect.{pattern}: axis {name!r} has units 0 to {n - 1}, not {list(units)}")
            found[name] = sorted({*found.get(name, ()), *units})
    return found
