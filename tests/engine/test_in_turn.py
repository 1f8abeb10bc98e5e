"""The first samples of shared data: those of one process, for any number of processes and any batches."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nodelens.engine import in_turn
from nodelens.engine.in_turn import InTurn


class Threads:
    """Processes as threads of this one: ``gathered`` waits until each of them has called it."""

    def __init__(self, ranks):
        self.ranks, self.barrier, self.values, self.own = (
            ranks,
            threading.Barrier(ranks, timeout=20),
            [None] * ranks,
            threading.local(),
        )

    def world(self):
        return self.own.rank, self.ranks

    def gathered(self, value):
        self.values[self.own.rank] = value
        self.barrier.wait()
        every = list(self.values)
        self.barrier.wait()
        return every

    def run(self, work, shares):
        def one(rank):
            self.own.rank = rank
            return work(shares[rank])

        with ThreadPoolExecutor(self.ranks) as pool:
            return list(pool.map(one, range(self.ranks)))


def taken(limit, batches, loaded=None):
    """The numbers of the samples that are read; a batch is [(sample, count), ...]."""

    def load():
        for batch in batches:
            if loaded is not None:
                loaded.append(len(batch))
            yield batch

    first, found = InTurn(limit, lambda batch: torch.tensor([count for _, count in batch], dtype=torch.int64)), []
    for batch in first.read(load()):
        found += [(sample, int(before)) for (sample, _), before in zip(batch, first.before, strict=True) if before < limit]
    return found


def dealt(samples, takers, sizes):
    """What each process has: takers share the samples, each with batches of its own size; the others have nothing."""
    shares = [[] for _ in sizes]
    for place, rank in enumerate(takers):
        own = samples[place :: len(takers)]
        shares[rank] = [own[k : k + sizes[rank]] for k in range(0, len(own), sizes[rank])]
    return shares


CASES = {
    "alone": ([0], [2]),
    "two": ([0, 1], [3, 1]),
    "three": ([0, 1, 2], [1, 4, 2]),
    "one of three is empty": ([0, 2], [2, 1, 5]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("limit", [1, 6, 7, 20, 10**6])
def test_processes_read_the_first_samples_of_one(monkeypatch, case, limit):
    takers, sizes = case
    counts = torch.randint(0, 4, (23,), generator=torch.Generator().manual_seed(limit)).tolist()
    before = torch.tensor([0, *counts]).cumsum(0).tolist()
    wanted = [(k, before[k]) for k in range(23) if before[k] < limit]
    threads = Threads(len(sizes))
    monkeypatch.setattr(in_turn, "world", threads.world)
    monkeypatch.setattr(in_turn, "gathered", threads.gathered)
    every = threads.run(lambda share: taken(limit, share), dealt([*enumerate(counts)], takers, sizes))
    assert sorted(pair for own in every for pair in own) == wanted
    assert all(own == sorted(own) for own in every)


def test_batches_without_samples_change_nothing_and_no_batch_behind_the_limit_is_loaded():
    loaded = []
    batches = [[], [(0, 2), (1, 2)], [], [(2, 2), (3, 2)], [(4, 2)]]
    assert taken(5, batches, loaded) == [(0, 0), (1, 2), (2, 4)]
    assert loaded == [0, 2, 0, 2]
    assert taken(5, []) == []


def test_counts_of_samples_that_all_have_passed_are_forgotten():
    turns = in_turn._Turns.empty()
    for _ in range(50):
        turns.add([torch.ones(4, dtype=torch.int64)])
    assert len(turns.counts[0]) <= 8
    assert turns.total == 200
    assert turns.before().tolist() == [196, 197, 198, 199]
