"""A sweep over criterion x allocation x compensation x mode x amount x seed: one file per finished cell, one table."""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from nodelens.messages import check_names
from nodelens.network.eval_mode import copy_of
from nodelens.pruning.context import PruningContext
from nodelens.pruning.planning import PruningOptions, plan_removal
from nodelens.pruning.prune import Apply, FineTuning, Pruned, carry_out, remove
from nodelens.pruning.removal_plan import RemovalPlan
from nodelens.pruning.surgery.mask import Removed
from nodelens.results.files import checked, read_json, write_json
from nodelens.results.identity import check_identity, code_version
from nodelens.statistics.processes import first_of

Evaluate = Callable[[Pruned], Mapping[str, Any]]
_RESULT = ("result", "removed", "about", "finetuned", "clock")  # what a finished cell has
Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Cell:
    """One point of a sweep; its name is that of its file."""

    options: PruningOptions

    @property
    def name(self) -> str:
        r = self.options
        return f"{r.criterion.name}-{r.allocation.kind}-{r.compensate}-{r.mode}-{r.amount:g}-{r.seed}"

    @property
    def key(self) -> str:
        """A hash of the options."""
        return hashlib.sha256(json.dumps(self.options.about, sort_keys=True, default=str).encode()).hexdigest()[:16]


def cells(**asked: Sequence[Any]) -> list[Cell]:
    """One cell per combination of the fields of ``PruningOptions``, each given as a list, in order.

    Raises ValueError for an empty list, or for two cells of the same name; TypeError for an unknown field.
    """
    check_names("cells", asked, [field.name for field in fields(PruningOptions)])
    for what, values in asked.items():
        if not len(values):
            raise ValueError(f"the sweep has no {what}: give at least one")
    grid = [Cell(PruningOptions(**dict(zip(asked, point, strict=True)))) for point in itertools.product(*asked.values())]
    names = [cell.name for cell in grid]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice:
        raise ValueError(f"the sweep has the cell {twice} twice: give criteria and allocations that differ in name")
    return grid


class Sweep:
    """Runs cells, writes each to ``folder/cells`` when it is finished, and reads finished cells instead of running them again.

    Scores and moments are measured once, for all cells. Cells that remove the same units in the same way (a deterministic
    criterion at several seeds) are run once. refused: {criterion: reason} of criteria that cannot score these groups.
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

    def run(self, todo: Sequence[Cell], progress: Progress = iter) -> list[dict[str, Any]]:
        """One row per cell. Raises ValueError if a finished cell had other options, or is of another model or other code."""
        finished = self.finished(todo)
        return [finished.get(cell.name) or self.run_cell(cell) for cell in progress(todo)]

    def finished(self, todo: Sequence[Cell]) -> dict[str, dict[str, Any]]:
        """{name: row} of the finished cells, which other cells of the same outcome take over. Raises ValueError as ``run``."""
        context = self.context
        check_identity(self.folder, {"model": context.fingerprint, "code": code_version(context.model)}, self.write)
        finished = first_of({cell.name: _finished(path) for cell in todo if (path := self.path(cell)).is_file()})
        for cell in todo:
            row = finished.get(cell.name)
            if row is not None:
                if row["cell"] != cell.key:
                    raise ValueError(f"{self.path(cell)} is of a sweep with other options: choose another folder")
                self.done.setdefault(row["outcome_key"], row)
        return finished

    def pending(self, todo: Sequence[Cell]) -> list[Cell]:
        """The cells whose outcome no finished cell has, the first one of each outcome; not those that are infeasible."""
        finished, found = self.finished(todo), dict[str, Cell]()
        for cell in todo:
            if cell.name in finished:
                continue
            try:
                key = self._outcome_key(cell, self._plan(cell))
            except ValueError:  # running it writes the reason down
                continue
            if key not in self.done:
                found.setdefault(key, cell)
        return list(found.values())

    def pruned(self, cell: Cell, plan: RemovalPlan | None = None) -> Pruned:
        """The pruned model of a cell. plan: of its only step, where it is known."""
        finetune = self.finetune(cell.options.seed) if self.finetune else None
        return carry_out(self.context, cell.options, self.table, self.apply, finetune, first=plan)

    def without(self, removed: Removed) -> nn.Module:
        """A copy of the dense model without units, of the size that a cell which removes them has; nothing is compensated."""
        model = copy_of(self.context.model)
        remove(model, self.context.groups, removed, self.apply)
        return model

    def path(self, cell: Cell) -> Path:
        """The file of a finished cell."""
        return self.folder / "cells" / f"{cell.name}.json"

    def run_cell(self, cell: Cell) -> dict[str, Any]:
        """Runs a cell and writes its row."""
        started = time.perf_counter()
        row: dict[str, Any] = {"name": cell.name, "cell": cell.key}
        try:
            row |= self._outcome(cell)
        except ValueError as error:  # an infeasible budget is a result, not a failure of the sweep
            row |= {"status": "infeasible", "error": str(error), "outcome_key": "", **_settings(cell)}
        row["seconds"] = time.perf_counter() - started
        if self.write:
            write_json(self.path(cell), row)
        return row

    def _outcome(self, cell: Cell) -> dict[str, Any]:
        started = time.perf_counter()
        plan = self._plan(cell)
        planned = time.perf_counter() - started
        key = self._outcome_key(cell, plan)
        same = self.done.get(key)
        if same is None:
            pruned = self.pruned(cell, plan)
            applied = time.perf_counter() - started - planned
            same = {"result": dict(self.evaluate(pruned)), "removed": pruned.plan.removed, "about": pruned.plan.about}
            same |= {"name": cell.name, "finetuned": dict(pruned.finetuned)}
            same["clock"] = {"plan_s": planned, "apply_s": applied, "evaluate_s": time.perf_counter() - started - planned - applied}
            self.done[key] = same | {"outcome_key": key}
        about = same["about"] | (plan.about if plan else {})
        return {
            "status": "done",
            "error": None,
            "outcome_key": key,
            "carried_out_as": same["name"],
            **_settings(cell),
            **{k: same[k] for k in _RESULT},
            "about": about,
            "plan": RemovalPlan(same["removed"]).key,
        }

    def _plan(self, cell: Cell) -> RemovalPlan | None:
        """The plan of a cell; None where scores are measured again on the way. Raises ValueError if it is infeasible."""
        options = cell.options
        if options.criterion.name in self.refused:
            raise ValueError(self.refused[options.criterion.name])
        return plan_removal(self.context, self.table, options) if options.schedule.kind == "one_shot" else None

    def _outcome_key(self, cell: Cell, plan: RemovalPlan | None) -> str:
        """Equal for cells with the same outcome: the removed units if there is one plan, else all options."""
        if plan is None:
            return cell.key
        seed = cell.options.seed if self.finetune else None
        return f"{plan.key}-{cell.options.compensate}-{seed}"


def _finished(path: Path) -> dict[str, Any]:
    """The row of a finished cell. Raises ValueError, with its file, for one that is damaged or has no result."""
    row = read_json(checked(path))
    status = row.get("status") if isinstance(row, dict) else None
    wanted = {"done": ("cell", "outcome_key", *_RESULT), "infeasible": ("cell", "outcome_key", "error")}.get(str(status))
    if wanted is None or any(key not in row for key in wanted) or (status == "done" and not isinstance(row["result"], dict)):
        lacks = "status" if wanted is None else next((key for key in wanted if key not in row), "result")
        raise ValueError(f"{path} is no finished cell of a sweep, it has no {lacks}: delete it, and the sweep computes it again")
    return row


def _settings(cell: Cell) -> dict[str, Any]:
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
