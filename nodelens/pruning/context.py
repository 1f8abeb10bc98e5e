"""The pruning context: a model, its pruning groups, their cost, and the data to score them with."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd
from torch import nn

from nodelens.engine.driver import device_of
from nodelens.engine.members import UnreadableGroupsError
from nodelens.network.batch import Batch
from nodelens.network.groups import Frozen, PruningGroup, PruningGroups
from nodelens.network.objective import Objective
from nodelens.pruning.criteria.criterion import Criterion
from nodelens.pruning.criteria.scoring import Reduce, columns_of, score_table
from nodelens.pruning.groups.find import find_groups
from nodelens.pruning.surgery.compensate import norms_behind
from nodelens.pruning.surgery.moments import input_moments
from nodelens.results.result import fingerprint
from nodelens.statistics.processes import world

from .cost import Cost


@dataclass
class PruningContext:
    """A model to prune, its groups and their cost, and the moments of its inputs, which are measured once.

    data: calibration batches that can be read several times; None if nothing has to be measured.
    """

    model: nn.Module
    groups: PruningGroups
    cost: Cost
    batch: Batch | None = None
    data: Iterable[Any] | None = None
    all_data: Iterable[Any] | None = None  # the batches of all processes, where data are one process's share
    seed: int = 0
    reduce: Reduce = "sum"
    objective: Objective = field(default_factory=Objective)
    columns: Mapping[str, Any] = field(default_factory=dict)
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
    options: Mapping[str, Any] = field(default_factory=dict)  # options of nl.analyze
    scores: pd.DataFrame | None = None  # given scores, which are read in place of measured ones
    _moments: dict[bool, Any] = field(default_factory=dict)
    _norms: dict[str, str] | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batch: Batch | None,
        data: Iterable[Any] | None = None,
        *,
        scope: str | Sequence[str] = "*",
        freeze: str | Sequence[str] = (),
        allow_approximate: bool = False,
        custom_groups: Sequence[PruningGroup | Mapping[str, Any]] = (),
        **options: Any,
    ) -> "PruningContext":
        """Finds the groups and their cost. Raises ValueError as ``find_groups`` and ``PruningGroups.chosen`` do."""
        batch = None if batch is None else batch.head(2).to(device_of(model))
        every = find_groups(model, batch, custom_groups)
        return cls(model, every.chosen(scope, freeze, allow_approximate), Cost.of(model, every, batch), batch, data, **options)

    def table(self, criteria: Iterable[Criterion]) -> pd.DataFrame:
        """Measures the columns that the criteria read, one row per unit; given scores as they are."""
        if self.scores is not None:
            return self.scores
        columns = columns_of(criteria, self.columns)
        keywords: dict[str, Any] = {"reduce": self.reduce, "seed": self.seed, "progress": self.progress}
        objective = {"task": self.objective.task or None, "output": self.objective.output, "loss": self.objective.loss}
        keywords |= objective | dict(self.options)
        try:
            return score_table(self.model, self.groups, columns, self.data, **keywords)
        except UnreadableGroupsError as error:
            if world()[1] > 1:  # each process has batches of its own: others would wait for this one in their first pass
                raise
            self._leave_out(error)
            return self.table(criteria)

    def _leave_out(self, error: UnreadableGroupsError) -> None:
        """Freezes the groups that no layer shows, with the reason. Raises the error if no other group is left."""
        kept = tuple(group for group in self.groups if group.name not in error.reasons)
        if not kept or len(kept) == len(self.groups):
            raise error
        frozen = [Frozen(name, f"its units cannot be scored: {why}") for name, why in error.reasons.items()]
        self.groups = PruningGroups(kept, (*self.groups.frozen, *frozen))
        rest = f" (and {len(frozen) - 1} more)" if len(frozen) > 1 else ""
        warnings.warn(f"group {frozen[0].what!r} is left out{rest}: {frozen[0].reason}", stacklevel=2)

    def tables(self, criteria: Sequence[Criterion]) -> tuple[pd.DataFrame, dict[str, str]]:
        """The columns of the criteria that can score these groups, and {criterion: reason} of those that cannot.

        Raises ValueError if none can.
        """
        try:
            return self.table(criteria), {}
        except ValueError as error:
            if len(criteria) == 1:
                raise
            first = error
        joined, refused = pd.DataFrame(), dict[str, str]()
        for criterion in criteria:
            try:
                table = self.table([criterion])
            except ValueError as error:
                refused[criterion.name] = str(error)
            else:
                joined = table if joined.empty else joined.join(table[[c for c in table if c not in joined]])
        if len(refused) == len(criteria):
            raise first
        return joined, refused

    def moments(self, products: bool) -> Any:
        """Moments of the consumers' inputs, measured once; products: with covariances."""
        if self.data is None:
            raise ValueError("compensation needs data: give data=, or compensate=none")
        if products not in self._moments:
            self._moments[products] = input_moments(self.model, self.groups, self.data, products, self.progress)
        return self._moments[products]

    def norms(self) -> dict[str, str]:
        """{consumer: batch norm that reads its output}."""
        if self._norms is None:
            self._norms = {} if self.batch is None else norms_behind(self.model, self.groups, self.batch)
        return self._norms

    @property
    def all_batches(self) -> Iterable[Any]:
        """The calibration batches of all processes. Raises ValueError without data."""
        data = self.data if self.all_data is None else self.all_data
        if data is None:
            raise ValueError("re-estimating batch norms needs data: give data=, or another compensate=")
        return data

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the model's weights."""
        return fingerprint(self.model)
