"""The order of training samples, and what is drawn while they are read: both are functions of seed and epoch."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from nodelens.statistics.seeding import seed_of, seeded

Draw = tuple[int, int]  # the position of a sample, and the seed of the epoch


class TrainingOrder(Sampler[Draw]):
    """The positions 0 to n - 1 in an order that is a function of (seed, epoch), the same in every process.

    Each iteration is one epoch, starting at ``epoch``; ``set_epoch``, which a Trainer calls, sets the next one. A training that is
    resumed thus reads the samples in the order of the training that was not interrupted.
    """

    def __init__(self, n: int, seed: int, epoch: int = 0):
        self.n, self.seed, self.epoch = n, seed, epoch

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Draw]:
        seed = seed_of(self.seed, "epoch", self.epoch)
        self.epoch += 1
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(seed))
        yield from ((position, seed) for position in order.tolist())

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        self.epoch = epoch


class SeededDraws(Dataset[Any]):
    """A data set read by a ``TrainingOrder``. Random transforms of a batch depend on the epoch's seed and its first sample only.

    They are the same for any number of loading processes and whether or not earlier batches were read by this process.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> Any:
        position, seed = draw
        with seeded(seed, "sample", position):
            return self.dataset[position]

    def __getitems__(self, draws: Sequence[Draw]) -> Any:
        first, seed = draws[0]
        with seeded(seed, "batch", first):
            return self.dataset.__getitems__([position for position, _ in draws])


def current_epoch(module: Any) -> int:
    """The epoch that the trainer of a data module is about to train: 0, or a later one after a restart."""
    return module.trainer.current_epoch if module.trainer is not None else 0
