"""A sweep: criterion x amount x seed, one file a finished cell, one table."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..files import read_json, write_json
from .criteria import RANDOM, random_scores, scores
from .removal import Mode, RemovalPlan, remove

Criteria = Mapping[str, Mapping[str, float] | str]
Evaluate = Callable[[RemovalPlan], Mapping[str, float]]
OF_EVALUATION = ("accuracy", "loss", "ece")


@dataclass(frozen=True)
class Cell:
    """One point of a sweep."""

    criterion: str
    amount: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.criterion}-{self.amount:g}-{self.seed}"


def cells(criteria: Criteria, amounts: Iterable[float], seeds: Iterable[int]) -> list[Cell]:
    """Every cell, in order. Raises ValueError where an axis is empty."""
    amounts, seeds = list(amounts), list(seeds)
    for axis, values in (("criterion", criteria), ("amounts", amounts), ("seeds", seeds)):
        if not values:
            raise ValueError(f"the sweep has no {axis}: give one at least")
    return [Cell(c, float(a), int(s)) for c in criteria for a in sorted(set(amounts)) for s in sorted(set(seeds))]


def plan_of(cell: Cell, units: pd.DataFrame, criterion: Mapping[str, float] | str, mode: Mode = "low") -> RemovalPlan:
    """Which units a cell removes, from one table of measured units."""
    scored = random_scores(units, cell.seed) if criterion == RANDOM else scores(units, criterion)  # type: ignore[arg-type]
    return remove(scored, cell.amount, cell.seed, mode)


def run_sweep(
    folder: Path,
    units: pd.DataFrame,
    criteria: Criteria,
    todo: Sequence[Cell],
    evaluate: Evaluate,
    mode: Mode = "low",
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[dict[str, Any]]:
    """Evaluates every cell and writes it to ``folder/cells``; a cell that is there already is read, not computed.

    Cells that remove the same units (a criterion without chance, at several seeds) are evaluated once.
    """
    done: dict[str, dict[str, Any]] = {}
    files = {cell: folder / "cells" / f"{cell.name}.json" for cell in todo}
    for path in files.values():
        if path.is_file():
            found = read_json(path)
            done.setdefault(found["plan"], found)
    results = []
    for cell in progress(todo):
        path = files[cell]
        if path.is_file():
            results.append(read_json(path))
            continue
        plan = plan_of(cell, units, criteria[cell.criterion], mode)
        same = done.get(plan.key)
        found = {k: same[k] for k in OF_EVALUATION} if same else dict(evaluate(plan))
        row = {
            "criterion": cell.criterion,
            "amount": cell.amount,
            "seed": cell.seed,
            "mode": mode,
            "units": len(units),
            "removed": plan.count,
            **{k: found[k] for k in OF_EVALUATION},
            "plan": plan.key,
        }
        evaluated = same["name"] if same else cell.name
        write_json(path, row | {"removed_units": plan.removed, "evaluated_as": evaluated, "name": cell.name})
        done.setdefault(plan.key, row | {"name": cell.name})
        results.append(row)
    return results


def table_of(results: Iterable[Mapping[str, Any]], dense: Mapping[str, float]) -> pd.DataFrame:
    """A row a cell, with the dense model's numbers beside it; no column depends on the machine or the clock."""
    columns = ["criterion", "amount", "seed", "mode", "units", "removed", *OF_EVALUATION, "plan"]
    table = pd.DataFrame([{k: row[k] for k in columns} for row in results])
    return table.assign(dense_accuracy=dense["accuracy"], dense_loss=dense["loss"])
