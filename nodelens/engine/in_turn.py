"""The first samples of data that processes share: the same ones for any number of processes and any batch size."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nodelens.statistics.processes import gathered, world

_NONE = torch.zeros(0, dtype=torch.int64)


@dataclass
class InTurn:
    """Reads this process's batches until those of all processes together have ``limit``, and counts what comes before each sample.

    The samples of the processes are taken in turn: the first of each process in the order of ranks, then the second of each, and so
    on. This is the order of the whole data where process r of N has the samples r, r + N, r + 2 N, ..., as ``data.loader`` and
    ``torch.utils.data.DistributedSampler`` deal them out.

    limit:  how many are read, of what ``count`` counts
    count:  the number of each sample of a batch, (B,), such as its predictions or tokens
    before: the sum of the numbers of all samples, of any process, before each sample of the batch that is being read, (B,) int64
    """

    limit: int
    count: Callable[[Any], Tensor]
    before: Tensor = _NONE

    def read(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches with a sample before which there are fewer than ``limit``. No further batch is loaded behind them.

        Collective, until all is read: between two batches the processes tell each other their numbers.
        """
        counted = ((item, counts) for item in batches if len(counts := self.count(item).long().cpu()))  # stays at its end
        turns, waiting = _Turns.empty(), None
        while turns.total < self.limit and not turns.ended:
            fresh: Tensor | None = _NONE
            if waiting is None:
                waiting, fresh = next(counted, (None, None))
            turns.add(gathered(fresh))
            if waiting is not None and (turns.settled or turns.total >= self.limit):
                self.before = turns.before()
                if self.before[0] < self.limit:
                    yield waiting
                waiting = None


@dataclass
class _Turns:
    """The counts of the samples of each process, from the sample ``begin`` on, and the sum of those before, of all processes."""

    counts: list[Tensor]
    last: list[int]  # the number of the first sample in the last batch of each process
    over: list[bool]  # whether a process has no more batches
    begin: int = 0
    passed: int = 0

    @classmethod
    def empty(cls) -> "_Turns":
        ranks = world()[1]
        return cls([_NONE] * ranks, [0] * ranks, [False] * ranks)

    @property
    def ended(self) -> bool:
        return all(self.over)

    @property
    def known(self) -> int:
        """The samples of each process whose place is known: no process that goes on has counted fewer."""
        ends = [len(counts) for counts in self.counts]
        return max(ends) if self.ended else min(end for end, over in zip(ends, self.over, strict=True) if not over)

    @property
    def total(self) -> int:
        """The sum of the counts up to there."""
        return self.passed + sum(int(counts[: self.known].sum()) for counts in self.counts)

    @property
    def settled(self) -> bool:
        """Whether the places of all samples in the last batch of this process are known."""
        return len(self.counts[world()[0]]) <= self.known

    def add(self, fresh: Sequence[Tensor | None]) -> None:
        """Counts of a batch of each process; none for one that waits, None for one that has no more."""
        self._forget()
        for rank, counts in enumerate(fresh):
            self.over[rank] = counts is None
            if counts is not None and len(counts):
                self.last[rank] = self.begin + len(self.counts[rank])
                self.counts[rank] = torch.cat([self.counts[rank], counts])

    def before(self) -> Tensor:
        """The sum of the counts before each sample in the last batch of this process."""
        rank = world()[0]
        table = torch.nn.utils.rnn.pad_sequence(self.counts)
        sums = self.passed + table.flatten().cumsum(0).reshape(table.shape) - table
        return sums[self.last[rank] - self.begin : len(self.counts[rank]), rank]

    def _forget(self) -> None:
        """Leaves out the samples before the last batches."""
        done = min([self.known, *(last - self.begin for last, over in zip(self.last, self.over, strict=True) if not over)])
        self.passed += sum(int(counts[:done].sum()) for counts in self.counts)
        self.counts, self.begin = [counts[done:] for counts in self.counts], self.begin + done
