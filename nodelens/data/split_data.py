"""The base data module: samples of one source, assigned to splits, and the loaders of the splits."""

import warnings
from abc import abstractmethod
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nodelens.messages import as_seed, setting

from .order import SeededDraws, TrainingOrder, current_epoch
from .splits import check_loading, pick, shard


class SplitData(lightning.LightningDataModule):
    """Disjoint train, val, test and calibration splits of numbered samples; subclasses implement `setup` and `numbered`."""

    unsplit: bool = False  # whether the source has no test set, so that the test set is a held-out share of it

    def __init__(self, batch_size: int, workers: int, seed: int, val: float, test: float, calibration: int):
        super().__init__()
        check_loading(batch_size, workers)
        self.batch_size, self.workers, self.seed = batch_size, workers, as_seed(seed, setting("dataset.seed"))
        self.shares: dict[str, Any] = {"val": val, "test": test, "calibration": calibration}
        self.indices: dict[str, Tensor] = {}

    @abstractmethod
    def numbered(self, ids: Tensor) -> Dataset[Any]:
        """The samples with these numbers, in this order; a whole batch is requested at once."""

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of the training split, in a new order each epoch, a function of `seed` and the epoch."""
        ids = self._ids("train")
        return self._load(ids, self.batch_size, TrainingOrder(len(ids), self.seed, current_epoch(self)))

    def val_dataloader(self) -> DataLoader[Any]:
        return self._load(self._ids("val"), self.batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._load(self._ids("test"), self.batch_size)

    def loader(self, split: str, rank: int = 0, world: int = 1, batch_size: int | None = None) -> DataLoader[Any]:
        """Batches, in a fixed order, of the samples at positions i with i % world == rank; may be empty.

        split: train, val, test, calibration or all. Raises: ValueError for another split, or a rank outside world.
        """
        return self._load(shard(self._ids(split), rank, world), batch_size or self.batch_size)

    def _ids(self, split: str) -> Tensor:
        self.setup()  # type: ignore[call-arg]
        return pick(self.indices, split)

    def _load(self, ids: Tensor, batch_size: int, order: TrainingOrder | None = None) -> DataLoader[Any]:
        samples = self.numbered(ids)
        return DataLoader(
            samples if order is None else SeededDraws(samples),
            batch_size=batch_size,
            sampler=order,
            collate_fn=_identity,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def silence_warnings() -> None:
    """Silence two warnings of Lightning that do not apply: more workers are slower for data in memory, and a stream read
    in one process has an exact length.
    """
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", "Your `IterableDataset` has `__len__` defined.*")


def _identity(batch: Any) -> Any:
    return batch
