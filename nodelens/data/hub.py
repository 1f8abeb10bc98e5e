"""Image data sets opened with `datasets`: a hub id, or a folder of images, of parquet files or from save_to_disk."""

from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from nodelens.messages import setting

from .batch import ImageBatch
from .columns import image_column, label_column
from .images import ImageData
from .opening import open_sets
from .order import current_epoch
from .source import Source
from .splits import shard
from .stream import Stream, StreamSource, open_stream
from .table import open_table


class Hub(ImageData):
    """A Hugging Face image data set.

    path, name:   a hub id and its configuration, or a local folder (or parquet file)
    train_split:  the training split; test_split: the test split; None: "test" if there is one
    image_key, label_key: the columns; None: found automatically
    streaming:    read in order without storing; `workers` is then the number of decoding threads
    Raises: FileNotFoundError if the data are neither local nor available from the hub; ValueError for missing splits or
    columns.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        train_split: str = "train",
        test_split: str | None = None,
        image_key: str | None = None,
        label_key: str | None = None,
        streaming: bool = False,
        **options: Any,
    ):
        super().__init__(**options)
        self.path, self.name, self.streaming = path, name, streaming
        self.train_split, self.test_split = train_split, test_split
        self.image_key, self.label_key = image_key, label_key

    def read(self) -> Source:
        sets = open_sets(self.path, self.name, self.streaming)
        what = f"dataset '{self.path}'"
        train = _split(sets, self.train_split, "train", what)
        test = None
        if self.test_split is not None or "test" in sets:
            test = _split(sets, self.test_split or "test", "test", what)
        if test is train:
            raise ValueError(
                f"{what}: train and test are the same split '{self.train_split}'; "
                f"set {setting('dataset.test_split', None)} to hold out a share of it"
            )
        self.unsplit = test is None
        parts = [train] if test is None else [train, test]
        features = train.features or datasets.Features()
        image = image_column(features, self.image_key, what)
        label = label_column(features, self.label_key, what)
        if isinstance(train, datasets.IterableDataset):
            return open_stream(parts, image, label, f"{self.path} {self.name} {self.train_split} {self.test_split}")
        return open_table(parts, image, label)

    def train_dataloader(self) -> DataLoader[ImageBatch]:
        if not self.streaming:
            return super().train_dataloader()
        return self._streamed(self._shared("train", even=True), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[ImageBatch]:
        return self._streamed(self._shared("val"), self.batch_size) if self.streaming else super().val_dataloader()

    def test_dataloader(self) -> DataLoader[ImageBatch]:
        return self._streamed(self._shared("test"), self.batch_size) if self.streaming else super().test_dataloader()

    def loader(self, split: str, rank: int = 0, world: int = 1, batch_size: int | None = None) -> DataLoader[ImageBatch]:
        if not self.streaming:
            return super().loader(split, rank, world, batch_size)
        return self._streamed(shard(self._ids(split), rank, world), batch_size or self.batch_size)

    def _shared(self, split: str, even: bool = False) -> Tensor:
        """The samples of this process under a Trainer, which shards map-style data sets but not streams.

        All processes must see equally many batches: training drops up to world - 1 samples, evaluation repeats up to
        world - 1, as Lightning does for map-style data sets.
        """
        ids = self._ids(split)
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        if even:
            ids = ids[: len(ids) // world * world]
        elif len(ids) % world:
            ids = torch.cat([ids, ids[: world - len(ids) % world]])
        return shard(ids, rank, world).sort().values

    def _streamed(self, ids: Tensor, batch_size: int, shuffle: bool = False) -> DataLoader[ImageBatch]:
        source = self._ready()
        if not isinstance(source, StreamSource):
            raise RuntimeError("the data were opened as a table; set streaming before setup()")
        order = (self.seed, current_epoch(self)) if shuffle else ()
        stream = Stream(source, ids, self._convert(), batch_size, self.classes or 0, self.workers, *order)
        return DataLoader(stream, batch_size=None, pin_memory=torch.cuda.is_available())


def _split(sets: dict[str, Any], name: str, role: str, what: str) -> Any:
    if name not in sets:
        raise ValueError(f"{what} has no split '{name}', it has {', '.join(sets)}; set {setting(f'dataset.{role}_split')}")
    return sets[name]
