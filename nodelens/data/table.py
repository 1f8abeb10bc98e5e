"""Samples of stored Hugging Face tables, decoded on access."""

import hashlib
from dataclasses import dataclass

import datasets
import torch
from torch import Tensor

from .columns import declared_classes, decoded
from .convert import Convert


@dataclass(frozen=True)
class TableSource:
    """A table with one column of undecoded images; the last `own_test` rows are the test set."""

    images: datasets.Dataset
    column: str
    labels: Tensor  # (n,) int64
    own_test: int
    classes: int | None
    fingerprints: tuple[str, ...]

    @property
    def rows(self) -> int:
        return len(self.images) - self.own_test

    def fetch(self, ids: Tensor, convert: Convert) -> Tensor:
        return convert.every([decoded(value) for value in self.images[ids.tolist()][self.column]])

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(" ".join(self.fingerprints).encode(), digest_size=16)
        digest.update(self.labels.numpy().data)
        return digest.hexdigest()


def open_table(parts: list[datasets.Dataset], image: str, label: str) -> TableSource:
    """The source of one or two tables (training and test)."""
    labels = torch.cat([torch.as_tensor(part.with_format("numpy")[label][:]).long() for part in parts])
    present = int(labels.max()) + 1 if len(labels) else None
    # cast undecoded, so that a plain column of bytes works too, and the features of both parts agree
    raw = [part.select_columns([image]).cast_column(image, datasets.Image(decode=False)) for part in parts]
    return TableSource(
        images=datasets.concatenate_datasets(raw),
        column=image,
        labels=labels,
        own_test=sum(len(part) for part in parts[1:]),
        classes=declared_classes(parts[0].features, label) or present,
        fingerprints=tuple(part._fingerprint for part in parts),  # the documented name in datasets
    )
