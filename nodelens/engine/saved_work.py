"""What a stopped analysis continues from: the sums of its readings of the data, and the parts that were done."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from nodelens.results.files import checked, write
from nodelens.results.result import fingerprint
from nodelens.statistics.processes import world

from .pass_state import Hashed, SeenOrder, State
from .signals import Signals, noted

FORM = 3  # version of the files
Rest = Callable[[Iterable[Any]], Iterator[Any]]


class Resumable(Protocol):
    """Sums over a reading of the data. Their state is plain values, which ``torch.load(weights_only=True)`` accepts."""

    def state_dict(self) -> State: ...
    def load_state_dict(self, state: Any) -> None: ...


@dataclass
class SavedWork:
    """Where an analysis keeps what it has done, and how often it saves the sums of a reading.

    key: identifies the analysis, its options and the model; files of anything else are not read. Each process has files of its own.
    """

    folder: Path
    minutes: float
    key: str
    readings: int = 0  # begun so far; they come in the same order each time

    @classmethod
    def of(cls, folder: str | Path | None, minutes: float, model: nn.Module, *about: Any) -> "SavedWork | None":
        """Of a folder; None without one. about: what else decides about the numbers."""
        if folder is None:
            return None
        known = [FORM, fingerprint(model), world()[1], *about]
        return cls(Path(folder), minutes, hashlib.sha256(json.dumps(known, default=str).encode()).hexdigest()[:16])

    def part(self, name: str, make: Callable[[], State]) -> State:
        """What ``make`` returns, from the file of an earlier call if it was done there."""
        file = self._file(hashlib.sha256(name.encode()).hexdigest()[:16])
        if file.is_file():
            return torch.load(checked(file), weights_only=True)["part"]
        made = make()
        write(file, lambda path: torch.save({"part": made}, path))
        return made

    @contextmanager
    def reading(self, sums: Resumable, hashed: Callable[[Any], Hashed], what: Any = None) -> Iterator[Rest]:
        """Yields a function that returns the batches of the data that are not in the sums yet, and restores the sums before.

        While the reading lasts, its sums are saved every so many minutes and before a signal ends the process; and at its end, so
        that it is not repeated if a later part of the analysis is stopped. hashed: a batch with its samples' hashes. what: plain
        values that decide about the sums, besides the key.
        """
        own = "" if what is None else "-" + hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
        file, self.readings = self._file(f"reading{self.readings}{own}"), self.readings + 1
        with noted() as signals:
            reading = _SavedReading(self, file, sums, hashed, signals)
            yield reading.rest
            reading.save()

    def _file(self, name: str) -> Path:
        return self.folder / f"process{world()[0]}" / f"{self.key}-{name}.pt"


@dataclass
class _SavedReading:
    """One reading: what it has read, and what was there before."""

    work: SavedWork
    file: Path
    sums: Resumable
    hashed: Callable[[Any], Hashed]
    signals: Signals
    seen: SeenOrder = field(default_factory=SeenOrder)
    last: float = field(default_factory=time.monotonic)

    def rest(self, data: Iterable[Any]) -> Iterator[Any]:
        """The batches that are not in the sums. Raises ValueError if the data do not begin with those that are."""
        begun = self._restored()
        for given in data:
            self.seen = self.seen.then(self.hashed(given))
            if self.seen.batches > begun.batches:
                yield given
                if self.signals.arrived or time.monotonic() - self.last >= 60 * self.work.minutes:
                    self.save()
            elif self.seen.batches == begun.batches:
                self.seen.check(begun, self.work.folder)
        if self.seen.batches < begun.batches:
            self.seen.check(begun, self.work.folder)

    def save(self) -> None:
        """Saves the sums, and obeys the signals that arrived."""
        state = {"seen": list(self.seen), "sums": self.sums.state_dict()}
        write(self.file, lambda path: torch.save(state, path))
        self.last = time.monotonic()
        self.signals.obey(f"the sums of {self.seen.batches} batches of this reading of the data are saved in {self.work.folder}")

    def _restored(self) -> SeenOrder:
        if not self.file.is_file():
            return SeenOrder()
        state = torch.load(checked(self.file), weights_only=True)
        self.sums.load_state_dict(state["sums"])
        return SeenOrder(*state["seen"])


@contextmanager
def reading(saved: SavedWork | None, sums: Resumable, hashed: Callable[[Any], Hashed], what: Any = None) -> Iterator[Rest]:
    """``SavedWork.reading``; without a folder, all batches are to be read, and nothing is saved."""
    if saved is None:
        yield iter
        return
    with saved.reading(sums, hashed, what) as rest:
        yield rest


def part(saved: SavedWork | None, name: str, make: Callable[[], State]) -> State:
    """``SavedWork.part``; without a folder, what ``make`` returns."""
    return make() if saved is None else saved.part(name, make)
