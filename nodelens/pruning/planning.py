"""Pruning options, and the removal plan that follows from them and a table of scores."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, get_args

import pandas as pd

from nodelens.messages import as_seed, kind_of
from nodelens.network.groups import PruningGroup, PruningGroups
from nodelens.network.loss_scale import Loss
from nodelens.network.outputs import Output
from nodelens.pruning.allocation.allocate import Allocation, allocate
from nodelens.pruning.allocation.densities import shapes_of_groups
from nodelens.pruning.allocation.selection import Mode, NanPolicy, select, ties
from nodelens.pruning.criteria.criterion import Criterion, random_scores
from nodelens.pruning.criteria.scoring import Reduce
from nodelens.pruning.surgery.compensate import Compensate, check_compensate

from .context import PruningContext
from .cost import Budget
from .removal_plan import RemovalPlan, check_removal
from .schedule import kept_shares

Apply = Literal["slice", "mask", "scale"]
_TAKES = {"protect": "a dict {group: units to keep}"}  # other options than objects with a name of their own


@dataclass(frozen=True)
class Schedule:
    """The number of pruning steps: ``one_shot``, or ``iterative``, which scores the masked model again before each step.

    shape: linear, geometric or cubic (fastest at the start); see ``kept_shares``. Shares are of the original units. Plans are
    nested: removed units stay removed. Compensation and fine-tuning follow every step.
    """

    kind: Literal["one_shot", "iterative"] = "one_shot"
    steps: int = 1
    shape: Literal["linear", "geometric", "cubic"] = "linear"

    def __post_init__(self) -> None:
        if self.kind not in ("one_shot", "iterative"):
            raise ValueError(f"schedule.kind is {self.kind!r}; it is one_shot or iterative")
        if (self.kind == "one_shot") != (self.steps == 1):
            raise ValueError(f"schedule {self.kind!r} has {self.steps} steps: one_shot takes 1, iterative 2 or more")
        kept_shares(0.5, self.steps, self.shape)

    def shares(self, amount: float) -> list[float]:
        """The share removed after each step; the last is the amount."""
        return [*(1 - kept for kept in kept_shares(amount, self.steps, self.shape)[:-1]), amount]


@dataclass(frozen=True)
class PruningOptions:
    """What to prune and how. ``nl.prune`` takes each of these by name too.

    criterion:  ``Criterion``
    amount:     share of the budget to remove
    allocation: how the budget is divided among the groups
    budget:     units, params or macs
    mode:       remove low, high or random scores
    compensate: none, bias, least_squares or batch_norm
    schedule:   one_shot or iterative
    protect:    {group: units to keep}
    nan_policy: of units without a score, see ``Rules``
    scope:      groups by name, pattern or kind: ffn, head, kv_group, channel, moe_ffn; expert for whole experts, not part of ``*``
    freeze:     groups not to prune
    custom_groups, allow_approximate: further groups; whether groups over which a norm reduces are included
    apply:      slice (smaller tensors), mask (zeros), scale (removed units times ``gate``)
    reduce:     how the values at several places of a unit are combined
    task, output, loss: what the model predicts, where, and its loss, as in ``AnalyzeOptions``
    """

    criterion: Criterion = field(default_factory=lambda: Criterion.of("taylor"))
    amount: float = 0.5
    allocation: Allocation = field(default_factory=Allocation)
    budget: Budget = "units"
    mode: Mode = "low"
    compensate: Compensate = "none"
    schedule: Schedule = field(default_factory=Schedule)
    seed: int = 0
    protect: Mapping[str, Sequence[int]] = field(default_factory=dict)
    nan_policy: NanPolicy = "drop"  # a metric can be NaN for a constant unit
    scope: str | Sequence[str] = "*"
    freeze: str | Sequence[str] = ()
    custom_groups: Sequence[PruningGroup | Mapping[str, Any]] = ()
    allow_approximate: bool = False
    apply: Apply = "slice"
    gate: float = 0.0
    reduce: Reduce = "sum"
    task: str | None = None
    output: Output = None
    loss: Loss | None = None

    def __post_init__(self) -> None:
        for name, kind in (("criterion", Criterion), ("allocation", Allocation), ("schedule", Schedule), ("protect", Mapping)):
            if not isinstance(given := getattr(self, name), kind):
                takes = _TAKES.get(name, f"a name or nl.{kind.__name__}(...)")
                raise TypeError(f"{name} is {kind_of(given)}; it takes {takes}")
        for name, units in self.protect.items():
            if isinstance(units, str) or not isinstance(units, Sequence) or not all(isinstance(u, Integral) for u in units):
                raise TypeError(f"protect.{name} is {units!r}; it is a list of numbers of units, as {{{name!r}: [0, 3]}}")
        if not isinstance(self.gate, Real):
            raise TypeError(f"gate is {self.gate!r}; it is a number by which removed units are multiplied, for apply='scale'")
        if self.apply not in get_args(Apply):
            raise ValueError(f"apply is {self.apply!r}; it is slice, mask or scale")
        object.__setattr__(self, "seed", as_seed(self.seed))
        check_removal(self.amount, self.mode)
        check_compensate(self.compensate)
        if self.budget not in ("units", "params", "macs"):
            raise ValueError(f"budget is {self.budget!r}; it is units, params or macs")

    @property
    def about(self) -> dict[str, Any]:
        """The options as plain values, for a plan or a table."""
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
            "nan_policy": self.nan_policy,
        }


def plan_removal(
    context: PruningContext,
    table: pd.DataFrame,
    options: PruningOptions,
    share: float | None = None,
    removed: Mapping[str, Sequence[int]] | None = None,
) -> RemovalPlan:
    """The units to remove according to a table of scores, and what the plan achieves.

    share: of the budget, instead of the options' amount; removed: units of earlier steps, which the plan includes. The
    plan's ``about`` has the number of units ``without_score`` and, where the cut goes through them, of ``ties``, by group.
    """
    removed, amount = removed or {}, options.amount if share is None else share
    scores = options.criterion.score(table, options.seed)
    protect = _protected(context.groups, options.protect)
    protect = _with(protect, options.criterion.protected(table), removed)
    budget, cost = options.budget, context.cost
    unscored = {str(g): int(n) for g, n in scores.isna().groupby(level="group").sum().items() if n}
    mode, first, types = options.mode, dict[str, Sequence[int]](), options.criterion.types
    if types is not None:
        labels = types.labels(context.groups, options.seed)
        protect = _with(protect, types.protected(scores, labels), removed)
        first = without(types.removed_first(labels), protect)
        scores = types.paced(random_scores(scores.index, options.seed) if mode == "random" else scores, labels, mode == "high")
        mode = "low"  # the order of removal is in the scores now
    rules: dict[str, Any] = {
        "mode": mode,
        "seed": options.seed,
        "protected": protect,
        "removed": removed,
        "nan_policy": options.nan_policy,
    }
    keep = allocate(
        context.groups,
        scores,
        amount,
        budget=budget,
        allocation=options.allocation,
        price=lambda kept: cost.price(budget, kept),
        unit_price=lambda kept: cost.price(options.allocation.per_cost or budget, kept),
        shapes=shapes_of_groups(context.model, context.groups),
        first=first,
        **rules,
    )
    chosen = select(context.groups, scores, keep, first=first, **rules)
    tied = ties(context.groups, scores, chosen, **rules)
    return RemovalPlan(
        chosen, {**options.about, "without_score": unscored, "ties": tied, **achieved(context, chosen, amount, budget)}
    )


def achieved(context: PruningContext, removed: Mapping[str, Sequence[int]], amount: float, budget: Budget) -> dict[str, Any]:
    """The units, parameters and MACs that a plan leaves, and its difference from the requested amount."""
    kept = {group.name: group.n - len(removed.get(group.name, ())) for group in context.groups}
    cost, units_removed = context.cost, sum(map(len, removed.values()))
    total = sum(group.n for group in context.groups)
    result: dict[str, Any] = {"units": total, "units_removed": units_removed, "smallest_kept": min(kept.values())}
    for name, count in (("params", cost.params), ("macs", cost.macs)):
        dense, left = count(), count(kept)
        result |= {name: left, f"dense_{name}": dense, f"{name}_share": left / dense if dense else float("nan")}
    dense, left = (total, total - units_removed) if budget == "units" else (result[f"dense_{budget}"], result[budget])
    return result | {"budget_error": (dense - left) - amount * dense, "exact": all(g.exact for g in context.groups)}


def _protected(groups: PruningGroups, protect: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """{group: units to keep} of {name, pattern or kind: units}."""
    protected: dict[str, Sequence[int]] = {}
    for pattern, units in protect.items():
        for name in sorted(groups.matching(pattern, "protect")):
            n = groups.named(name).n
            if any(not 0 <= u < n for u in units):
                raise ValueError(f"protect.{pattern}: group {name!r} has units 0 to {n - 1}, not {list(units)}")
            protected[name] = sorted({*protected.get(name, ()), *units})
    return protected


def _with(protect: dict[str, Sequence[int]], more: Mapping[str, Sequence[int]], removed: Mapping[str, Sequence[int]]) -> dict:
    """Protected units and more of them, except those that an earlier plan removed."""
    names = [*protect, *(name for name in more if name not in protect)]
    gone = {name: {*removed.get(name, ())} if name in more else set() for name in names}
    return {name: sorted({*protect.get(name, ()), *more.get(name, ())} - gone[name]) for name in names}


def without(units: Mapping[str, Sequence[int]], others: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Units by group, sorted, without others."""
    return {name: sorted({*ids} - {*others.get(name, ())}) for name, ids in units.items()}
