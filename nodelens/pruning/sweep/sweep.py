"""A sweep: criterion x allocation x compensation x mode x amount x seed, one file a finished cell, one table."""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from nodelens.pruning.context import PruningContext
from nodelens.pruning.planning import PruningOptions, plan_removal
from nodelens.pruning.prune import Apply, FineTuning, Pruned, carry_out
from nodelens.pruning.removal_plan import RemovalPlan
from nodelens.results.files import read_json, write_json
from nodelens.statistics.processes import first_of

CLOCK = ("plan_s", "apply_s", "recover_s", "evaluate_s", "seconds")
Evaluate = Callable[[Pruned], Mapping[str, Any]]
Show = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Cell:
    """One point of a sweep, with a name that is a file's."""

    options: PruningOptions

    @property
    def name(self) -> str:
        r = self.options
        return f"{r.criterion.name}-{r.allocation.kind}-{r.compensate}-{r.mode}-{r.amount:g}-{r.seed}"

    @property
    def key(self) -> str:
        """A hash of all that was asked for."""
        return hashlib.sha256(json.dumps(self.options.about, sort_keys=True, default=str).encode()).hexdigest()[:16]


def cells(**asked: Sequence[Any]) -> list[Cell]:
    """Every combination of the options' fields, each a list, in order.

    Raises ValueError for an empty list, or a cell named twice.
    """
    for what, values in asked.items():
        if not len(values):
            raise ValueError(f"the sweep has no {what}: give one at least")
    found = [Cell(PruningOptions(**dict(zip(asked, point, strict=True)))) for point in itertools.product(*asked.values())]
    names = [cell.name for cell in found]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice:
        raise ValueError(f"the sweep has the cell {twice} twice: give criteria and allocations that differ in name")
    return found


class Sweep:
    """Carries out cells, writes each to ``folder/cells`` when it is done, and reads it again where it is there.

    Scores and moments are those of the context, measured once. Cells that remove the same units in the same way (a criterion
    without chance, at several seeds) are carried out once. refused: criteria that cannot score these groups, and why.
    """

    def __init__(
        self,
        folder: Path,
        context: PruningContext,
        table: pd.DataFrame,
        evaluate: Evaluate,
        apply: Apply = "slice",
        finetune: Callable[[int], FineTuning] | None = None,
        write: bool = True,
        refused: Mapping[str, str] | None = None,
    ):
        self.folder, self.context, self.table, self.evaluate = folder, context, table, evaluate
        self.apply, self.finetune, self.write = apply, finetune, write
        self.refused = refused or {}
        self.done: dict[str, dict[str, Any]] = {}

    def run(self, todo: Sequence[Cell], progress: Show = iter) -> list[dict[str, Any]]:
        """A row a cell. Raises ValueError where a finished cell was another's."""
        found = first_of({cell.name: read_json(path) for cell in todo if (path := self._path(cell)).is_file()})
        for cell in todo:
            row = found.get(cell.name)
            if row is not None:
                if row["cell"] != cell.key:
                    raise ValueError(f"{self._path(cell)} was carried out with other settings: choose another folder")
                self.done.setdefault(row["way"], row)
        return [found.get(cell.name) or self._new(cell) for cell in progress(todo)]

    def carried_out(self, cell: Cell) -> Pruned:
        """The pruned model of a cell."""
        finetune = self.finetune(cell.options.seed) if self.finetune else None
        return carry_out(self.context, cell.options, self.table, self.apply, finetune)

    def _path(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.name}.json"

    def _new(self, cell: Cell) -> dict[str, Any]:
        started = time.perf_counter()
        row: dict[str, Any] = {"name": cell.name, "cell": cell.key}
        try:
            row |= self._outcome(cell)
        except ValueError as error:  # a budget that floors make impossible is an answer too
            row |= {"status": "infeasible", "error": str(error), "way": "", **_asked(cell)}
        row["seconds"] = time.perf_counter() - started
        if self.write:
            write_json(self._path(cell), row)
        return row

    def _outcome(self, cell: Cell) -> dict[str, Any]:
        options, started = cell.options, time.perf_counter()
        if options.criterion.name in self.refused:
            raise ValueError(self.refused[options.criterion.name])
        one_shot = options.schedule.kind == "one_shot"
        plan = plan_removal(self.context, self.table, options) if one_shot else None
        planned = time.perf_counter() - started
        way = self._way(cell, plan)
        same = self.done.get(way)
        if same is None:
            pruned = self.carried_out(cell)
            applied = time.perf_counter() - started - planned
            same = {"result": dict(self.evaluate(pruned)), "removed": pruned.plan.removed, "about": pruned.plan.about}
            same |= {"name": cell.name, "finetuned": dict(pruned.finetuned)}
            same["clock"] = {"plan_s": planned, "apply_s": applied, "evaluate_s": time.perf_counter() - started - planned - applied}
            self.done[way] = same | {"way": way}
        about = same["about"] | (plan.about if plan else {})
        return {
            "status": "done",
            "error": None,
            "way": way,
            "carried_out_as": same["name"],
            **_asked(cell),
            **{k: same[k] for k in ("result", "removed", "about", "finetuned", "clock")},
            "about": about,
            "plan": RemovalPlan(same["removed"]).key,
        }

    def _way(self, cell: Cell, plan: RemovalPlan | None) -> str:
        """What decides the outcome: the units, where one plan says them; else all that was asked."""
        if plan is None:
            return cell.key
        chance = cell.options.seed if self.finetune else None
        return f"{plan.key}-{cell.options.compensate}-{chance}"


def _asked(cell: Cell) -> dict[str, Any]:
    r = cell.options
    schedule = r.schedule.kind if r.schedule.kind == "one_shot" else f"{r.schedule.kind}:{r.schedule.steps}"
    return {
        "criterion": r.criterion.name,
        "allocation": r.allocation.kind,
        "compensate": r.compensate,
        "mode": r.mode,
        "amount": r.amount,
        "seed": r.seed,
        "budget": r.budget,
        "schedule": schedule,
    }
