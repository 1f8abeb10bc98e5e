"""A model that is to lose units, and what is known of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd
from torch import nn

from nodelens.engine.analyze import device_of
from nodelens.network.batch import Batch
from nodelens.network.groups import PruningGroup, PruningGroups
from nodelens.network.targets import summed_loss
from nodelens.pruning.criteria.criterion import Criterion
from nodelens.pruning.criteria.scoring import Reduce, columns_of, score_table
from nodelens.pruning.groups.find import find_groups
from nodelens.pruning.surgery.compensate import norms_behind
from nodelens.pruning.surgery.moments import input_moments
from nodelens.results.result import fingerprint

from .cost import Cost


@dataclass
class PruningContext:
    """A model that is to lose units: its groups, their cost, and what was measured of them, each thing once.

    data: calibration batches that can be read again and again; None where nothing is measured.
    """

    model: nn.Module
    groups: PruningGroups
    cost: Cost
    batch: Batch | None = None
    data: Iterable[Any] | None = None
    whole: Iterable[Any] | None = None  # where data are one process's share: those of all processes
    seed: int = 0
    reduce: Reduce = "sum"
    loss: Any = summed_loss
    columns: Mapping[str, Any] = field(default_factory=dict)
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
    options: Mapping[str, Any] = field(default_factory=dict)  # of nl.analyze
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
        """Finds the groups and counts what they cost. Raises ValueError as ``find_groups`` and ``PruningGroups.chosen`` do."""
        batch = None if batch is None else batch.head(2).to(device_of(model))
        every = find_groups(model, batch, custom_groups)
        return cls(model, every.chosen(scope, freeze, allow_approximate), Cost.of(model, every, batch), batch, data, **options)

    def table(self, criteria: Iterable[Criterion]) -> pd.DataFrame:
        """What the criteria read, a row a unit, measured now."""
        columns = columns_of(criteria, self.columns)
        keywords = {"reduce": self.reduce, "seed": self.seed, "loss": self.loss, "progress": self.progress, **self.options}
        return score_table(self.model, self.groups, columns, self.data, **keywords)

    def tables(self, criteria: Sequence[Criterion]) -> tuple[pd.DataFrame, dict[str, str]]:
        """What those criteria read that can score these groups, and {criterion: why it cannot}.

        Raises ValueError where none can.
        """
        try:
            return self.table(criteria), {}
        except ValueError as error:
            if len(criteria) == 1:
                raise
            first = error
        found, refused = pd.DataFrame(), dict[str, str]()
        for criterion in criteria:
            try:
                table = self.table([criterion])
            except ValueError as error:
                refused[criterion.name] = str(error)
            else:
                found = table if found.empty else found.join(table[[c for c in table if c not in found]])
        if len(refused) == len(criteria):
            raise first
        return found, refused

    def moments(self, products: bool) -> Any:
        """What consumers read on average, measured once."""
        if self.data is None:
            raise ValueError("compensation needs data: give data=, or compensate=none")
        if products not in self._moments:
            self._moments[products] = input_moments(self.model, self.groups, self.data, products, self.progress)
        return self._moments[products]

    def norms(self) -> dict[str, str]:
        """{consumer: the batch norm behind it}."""
        if self._norms is None:
            self._norms = {} if self.batch is None else norms_behind(self.model, self.groups, self.batch)
        return self._norms

    @property
    def all_batches(self) -> Iterable[Any]:
        """The calibration batches of all processes. Raises ValueError without data."""
        found = self.data if self.whole is None else self.whole
        if found is None:
            raise ValueError("re-estimating batch norms needs data: give data=, or another compensate=")
        return found

    @cached_property
    def fingerprint(self) -> str:
        """Of the model's weights."""
        return fingerprint(self.model)
