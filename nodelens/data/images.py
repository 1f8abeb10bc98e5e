"""The base data module of all image sources."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from nodelens.messages import as_seed, setting

from .batch import ImageBatch
from .convert import Convert
from .order import SeededDraws, TrainingOrder, current_epoch
from .source import Images, Source, check_labels
from .splits import check_loading, make_splits, pick, shard, write_splits


class ImageData(lightning.LightningDataModule):
    """Disjoint train, val, test and calibration splits of one source; subclasses implement `read`.

    classes, channels, size: what the network expects; images are converted, labels are checked; None: as found
    mean, std:    normalisation after uint8 is scaled to [0, 1]; one number, or one per channel
    val, test:    held-out shares of the samples; test applies only if the source has no test set
    calibration:  samples held out from training, at most half of the remaining ones
    seed:         of the splits and of the training order; workers: loading processes
    Raises: ValueError, in `setup`, for unsuitable labels, channels or shares.
    """

    unsplit: bool = False  # whether the source has no test set, so that the test set is a held-out share of it

    def __init__(
        self,
        *,
        classes: int | None = None,
        channels: int | None = None,
        size: int | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        batch_size: int = 64,
        val: float = 0.1,
        test: float = 0.2,
        calibration: int = 512,
        seed: int = 0,
        workers: int = 0,
    ):
        super().__init__()
        check_loading(batch_size, workers)
        self.classes, self.channels, self.size = classes, channels, size
        self.mean, self.std, self.batch_size, self.workers = mean, std, batch_size, workers
        self.seed = as_seed(seed, setting("dataset.seed"))
        self.shares: dict[str, Any] = {"val": val, "test": test, "calibration": calibration}
        self.source: Source | None = None
        self.indices: dict[str, Tensor] = {}

    def read(self) -> Source:
        """Open the source; called once."""
        raise NotImplementedError(f"{type(self).__name__} does not define read(), which opens its source")

    def setup(self, stage: str | None = None) -> None:
        """Read and split; the second call does nothing."""
        _silence_warnings()
        if self.source is not None:
            return
        source = self.read()
        self.indices = make_splits(source.rows, source.own_test, seed=self.seed, **self.shares)
        self.classes = self._found_classes(source)
        shape = source.fetch(torch.zeros(1, dtype=torch.int64), self._convert()).shape  # also checks mean and std
        self.channels = shape[1]
        self.size = self.size or (shape[2] if shape[2] == shape[3] else None)
        self.source = source

    def train_dataloader(self) -> DataLoader[ImageBatch]:
        """Shuffled batches of the training split, in a new order each epoch, a function of `seed` and the epoch."""
        ids = self._ids("train")
        return self._load(ids, self.batch_size, TrainingOrder(len(ids), self.seed, current_epoch(self)))

    def val_dataloader(self) -> DataLoader[ImageBatch]:
        return self._load(self._ids("val"), self.batch_size)

    def test_dataloader(self) -> DataLoader[ImageBatch]:
        return self._load(self._ids("test"), self.batch_size)

    def loader(self, split: str, rank: int = 0, world: int = 1, batch_size: int | None = None) -> DataLoader[ImageBatch]:
        """Batches, in a fixed order, of the samples at positions i with i % world == rank; may be empty.

        split: train, val, test, calibration or all. Raises: ValueError for another split, or a rank outside world.
        """
        return self._load(shard(self._ids(split), rank, world), batch_size or self.batch_size)

    def save_splits(self, folder: str | Path) -> Path:
        """Write `splits.json` into `folder`: fingerprint, seed, sizes, and the sample numbers of each split except train."""
        self.setup()
        return write_splits(folder, self.indices, {"fingerprint": self.fingerprint(), "seed": self.seed})

    def fingerprint(self) -> str:
        """A hash of the source's samples, before conversion."""
        self.setup()
        return self._ready().fingerprint()

    def _ids(self, split: str) -> Tensor:
        self.setup()
        return pick(self.indices, split)

    def _ready(self) -> Source:
        if self.source is None:
            raise RuntimeError("the data are not loaded; call setup() first")
        return self.source

    def _convert(self) -> Convert:
        return Convert(self.size, self.channels, self.mean, self.std)

    def _found_classes(self, source: Source) -> int:
        classes = self.classes or source.classes
        if classes is None:
            raise ValueError(f"the number of classes of the source is unknown; set {setting('dataset.classes')}")
        if source.labels is not None:
            check_labels(source.labels, classes)
        return classes

    def _load(self, ids: Tensor, batch_size: int, order: TrainingOrder | None = None) -> DataLoader[ImageBatch]:
        images = Images(self._ready(), ids, self._convert())
        return DataLoader(
            images if order is None else SeededDraws(images),
            batch_size=batch_size,
            sampler=order,
            collate_fn=_identity,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def _silence_warnings() -> None:
    """Silence two warnings of Lightning that do not apply: more workers are slower for data in memory, and a stream read
    in one process has an exact length.
    """
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", "Your `IterableDataset` has `__len__` defined.*")


def _identity(batch: Any) -> Any:
    return batch
