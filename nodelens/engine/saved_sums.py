"""Sums of an unfinished pass on disk: they are saved now and then, and before a signal ends the process, and continued from."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from nodelens.network.objective import Objective
from nodelens.results.files import checked, write
from nodelens.results.result import fingerprint
from nodelens.statistics.processes import gathered, world

from .collect import Pass
from .identity import identity
from .pass_state import SeenOrder
from .plan import Plan
from .request import describe_metrics
from .signals import Signals, noted

FORM = 2  # version of the files


@dataclass
class SavedSums:
    """Where the sums of the passes of one analysis are saved, and when.

    key: identifies what is measured; files of anything else are not read. Each process saves its own sums: they are added after the
    pass. signals: after the batch during which one arrives the sums are saved, and then it is obeyed.
    """

    folder: Path
    minutes: float
    key: str
    data: Iterable[Any]  # from their beginning, unless they are an iterator
    signals: Signals
    last: float = field(default_factory=time.monotonic)

    def of_pass(self, number: int) -> "SavedPass":
        """Those of one pass over the data, numbered from 0."""
        return SavedPass(self, number)

    @property
    def due(self) -> bool:
        """Whether the sums should be saved now."""
        return bool(self.signals.arrived) or time.monotonic() - self.last >= 60 * self.minutes

    def file(self, number: int, round: int) -> Path:
        """The file of a pass, and of a round if the pass reads the data several times."""
        return self.folder / f"process{world()[0]}" / f"{self.key}-pass{number}-round{round}.pt"


@dataclass
class SavedPass:
    """The sums of one pass: restored at its start, and saved between two batches."""

    saved: SavedSums
    number: int
    done: SeenOrder = field(default_factory=SeenOrder)  # the batches of the current round that are in the sums

    def restore(self, collected: Pass) -> int | None:
        """Continues from the last sums that were saved, and returns their round; None if there are none. Collective."""
        files = {k: file for k in range(collected.rounds) if (file := self.saved.file(self.number, k)).is_file()}
        round = max(set.intersection(*({0, *held} for held in gathered(list(files)))))
        if round not in files:
            return None
        state = torch.load(checked(files[round]), weights_only=True)
        collected.load_state_dict(state["sums"])
        self.done = collected.seen
        return round

    def rest(self, data: Iterable[Any], collected: Pass) -> Iterator[Any]:
        """The batches that are not in the sums yet; before each of them the sums are saved if that is due.

        Batches of a list, or of a loader in a fixed order, are skipped; others are read once more, without running the model.
        Raises ValueError if they are not the ones in the sums.
        """
        begun, self.done = self.done, SeenOrder()
        skipped = max(0, begun.batches - 1) if _can_start_anywhere(self.saved.data) else 0
        seen = SeenOrder(skipped)
        for given in _from(self.saved.data, skipped) if skipped else data:
            if seen.batches == begun.batches:
                if self.saved.due:
                    self.save(collected)
                yield given
                continue
            seen = seen.then(collected.objective.batch(given, collected.plan.groups, collected.seed, collected.plan.cuts))
            if seen.batches == begun.batches:
                seen.check(begun, self.saved.folder, last_only=bool(skipped))
        if seen.batches < begun.batches:
            seen.check(begun, self.saved.folder)

    def save(self, collected: Pass) -> None:
        """Saves the sums, and obeys the signals that arrived."""
        file = self.saved.file(self.number, collected.round)
        state = {"form": FORM, "sums": collected.state_dict()}
        write(file, lambda path: torch.save(state, path))
        self.saved.last = time.monotonic()
        batches = f"{collected.seen.batches} batches of this reading of the data"
        self.saved.signals.obey(f"the sums of {batches} are saved in {self.saved.folder}")

    def finish(self, collected: Pass) -> None:
        """Ends a round: a signal that arrived during its last batch is obeyed, too."""
        if self.saved.signals.arrived:
            self.save(collected)


@contextmanager
def saved_sums(
    folder: str | Path | None, minutes: float, key: Callable[[], str], data: Iterable[Any]
) -> Iterator[SavedSums | None]:
    """The saved sums of a folder, while signals are noted; None without a folder."""
    if folder is None:
        yield None
        return
    with noted() as signals:
        yield SavedSums(Path(folder), minutes, key(), data, signals)


def key_of(model: nn.Module, parts: Sequence[Plan], objective: Objective, first: Any, seed: int) -> str:
    """A hash of what is measured: the weights, the statistics of each pass, the first batch, the options and the processes."""
    plan, loss = parts[0], getattr(objective.loss, "loss", objective.loss)  # how it is scaled is found out from the first batch
    about = {
        "form": FORM,
        "model": fingerprint(model),
        "plans": [part.rows() for part in parts],
        "metrics": describe_metrics(plan),
        "options": [seed, plan.groups, plan.positions, plan.precision, str(plan.covariance), objective.about, identity(loss)],
        "processes": world()[1],
        "first": None if first is None else int(SeenOrder().then(objective.batch(first, plan.groups, seed)).last),
        "cuts": None if plan.cuts is None else plan.cuts.tolist(),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _can_start_anywhere(data: Any) -> bool:
    """Whether data are a list of batches, or a loader of numbered samples in the order of their numbers."""
    if isinstance(data, (list, tuple)):
        return True
    if type(data) is not DataLoader or isinstance(data.dataset, IterableDataset) or data.batch_sampler is None:
        return False
    # with a batch sampler of one's own, a loader's sampler says nothing about the order
    return type(data.batch_sampler) is BatchSampler and isinstance(data.batch_sampler.sampler, SequentialSampler)


def _from(data: Any, batch: int) -> Iterable[Any]:
    """The batches from one of them on, numbered from 0."""
    if not isinstance(data, DataLoader):
        return data[batch:]
    return DataLoader(
        data.dataset,
        batch_sampler=list(data.batch_sampler)[batch:],  # type: ignore[arg-type]
        collate_fn=data.collate_fn,
        num_workers=data.num_workers,
        pin_memory=data.pin_memory,
        worker_init_fn=data.worker_init_fn,
    )
