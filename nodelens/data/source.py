"""The sources of data modules: numbered samples, fetched in batches."""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nodelens.messages import setting

from .batch import ImageBatch
from .convert import Convert


class Source(Protocol):
    """Training samples 0 .. rows - 1, followed by the `own_test` samples of the test set of the source."""

    @property
    def rows(self) -> int: ...
    @property
    def own_test(self) -> int: ...
    @property
    def classes(self) -> int | None:
        """The number of classes that the source declares or contains; None if unknown."""
        ...

    @property
    def labels(self) -> Tensor | None:
        """(rows + own_test,) int64; None if they are known only while streaming."""
        ...

    def fetch(self, ids: Tensor, convert: Convert) -> Tensor:
        """The converted images of `ids`, (len(ids), C, H, W)."""
        ...

    def fingerprint(self) -> str:
        """A hash that changes with the samples."""
        ...


@dataclass(frozen=True)
class ArraySource:
    """Images in memory."""

    x: Tensor  # (n, C, H, W)  uint8 or float32
    labels: Tensor  # (n,)          int64
    own_test: int = 0

    @property
    def rows(self) -> int:
        return len(self.x) - self.own_test

    @property
    def classes(self) -> int | None:
        return int(self.labels.max()) + 1 if len(self.labels) else None

    def fetch(self, ids: Tensor, convert: Convert) -> Tensor:
        return convert(self.x[ids])

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.x, self.labels):
            digest.update(f"{array.dtype} {tuple(array.shape)} {self.own_test}".encode())
            digest.update(array.contiguous().numpy().data)
        return digest.hexdigest()


class Images(Dataset[ImageBatch]):
    """The samples `ids` of a source; a loader requests a whole batch of positions at once."""

    def __init__(self, source: Source, ids: Tensor, convert: Convert):
        if source.labels is None:
            raise ValueError("a stream has no random access; use Stream")
        self.source, self.labels, self.ids, self.convert = source, source.labels, ids, convert

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, position: int) -> ImageBatch:
        return ImageBatch(*(part[0] for part in self.__getitems__([position])))

    def __getitems__(self, positions: list[int]) -> ImageBatch:
        ids = self.ids[torch.as_tensor(positions)]
        return ImageBatch(self.source.fetch(ids, self.convert), self.labels[ids], ids)


def check_labels(labels: Tensor, classes: int) -> None:
    """Raises: ValueError when a label is outside 0 .. classes - 1."""
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        low, high = int(labels.min()), int(labels.max())
        fix = f"set {setting('dataset.classes', high + 1)}" if low >= 0 else "remove the samples without a label"
        raise ValueError(f"labels run from {low} to {high}, {setting('dataset.classes')} is {classes}; {fix}")
