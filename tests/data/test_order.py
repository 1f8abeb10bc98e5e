import random

import numpy as np
import pytest
import torch

from nodelens.data import Digits, Text
from nodelens.data.order import TrainingOrder
from nodelens.data.source import ArraySource


class Moving(ArraySource):
    """Images that move at random, drawn from each of the global generators."""

    def fetch(self, ids, convert):
        return super().fetch(ids, convert) + torch.rand(len(ids), 1, 1, 1) + random.random() + np.random.rand()


class MovingDigits(Digits):
    def read(self):
        source = super().read()
        return Moving(source.x, source.labels)


def positions(order):
    return [position for position, _ in order]


def test_the_order_is_a_function_of_seed_and_epoch():
    order = TrainingOrder(50, seed=3)
    epochs = [positions(order) for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for k in (2, 0, 1):
        order.set_epoch(k)
        assert positions(order) == epochs[k]
        assert positions(TrainingOrder(50, seed=3, epoch=k)) == epochs[k]
    assert positions(TrainingOrder(50, seed=2, epoch=1)) != positions(TrainingOrder(50, seed=3, epoch=0)), "not seed + epoch"
    assert len(order) == 50


@pytest.mark.parametrize("make", [Digits, lambda: Text(length=16, max_tokens=2000)], ids=["images", "texts"])
def test_a_data_module_opens_the_epoch_of_its_trainer(make):
    def ids(loader):
        return torch.cat([batch["ids"] if isinstance(batch, dict) else batch.ids for batch in loader])

    loader = make().train_dataloader()
    first, second = ids(loader), ids(loader)
    later = make()
    later.trainer = type("Trainer", (), {"current_epoch": 1})()
    assert torch.equal(ids(later.train_dataloader()), second)
    assert not torch.equal(first, second)


def test_random_transforms_depend_on_neither_worker_processes_nor_earlier_batches():
    alone, shared = (MovingDigits(workers=workers, batch_size=300).train_dataloader() for workers in (0, 2))
    epochs = [list(loader) for loader in (alone, shared) for _ in range(2)]
    for a, b in zip(epochs[:2], epochs[2:], strict=True):
        assert all(torch.equal(x.ids, y.ids) and torch.equal(x.x, y.x) for x, y in zip(a, b, strict=True))
    shifts = torch.cat([batch.x.amin((1, 2, 3)) for epoch in epochs[:2] for batch in epoch])
    assert len(shifts.unique()) > 0.9 * len(shifts), "drawn anew for every sample and epoch"
    one, again = (MovingDigits().train_dataloader().dataset[(5, 7)].x for _ in range(2))
    assert torch.equal(one, again)
