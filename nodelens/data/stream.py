"""Streamed samples, numbered as in a table and never stored."""

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from nodelens.messages import setting
from nodelens.statistics.seeding import seed_of

from .batch import ImageBatch
from .columns import declared_classes, decoded
from .convert import Convert
from .source import check_labels

_BUFFER = 1024  # size of the shuffle buffer, in undecoded samples


@dataclass(frozen=True)
class StreamSource:
    """One or two streams (training and test), whose samples are numbered in order."""

    parts: list[datasets.IterableDataset]
    counts: list[int]
    image: str
    label: str
    classes: int | None
    name: str
    labels: None = None  # known only while streaming

    @property
    def rows(self) -> int:
        return self.counts[0]

    @property
    def own_test(self) -> int:
        return sum(self.counts[1:])

    def numbered(self, ids: Tensor) -> Iterator[tuple[int, Any, int]]:
        """(number, undecoded image, label) of the samples `ids`, in the order of the stream."""
        wanted = torch.zeros(sum(self.counts), dtype=torch.bool)
        wanted[ids] = True
        start = 0
        for part, count in zip(self.parts, self.counts, strict=True):
            mine = wanted[start : start + count].nonzero()
            last = int(mine[-1]) if len(mine) else -1
            seen = 0
            for row in islice(part, last + 1):
                if wanted[start + seen]:
                    yield start + seen, row[self.image], row[self.label]
                seen += 1
            if seen <= last:
                raise ValueError(
                    f"dataset {self.name} declares {count} samples, but its stream ended after {seen}; set "
                    f"{setting('dataset.streaming', False)}"
                )
            start += count

    def fetch(self, ids: Tensor, convert: Convert) -> Tensor:
        found = {number: image for number, image, _ in self.numbered(ids)}
        return convert.every([decoded(found[number]) for number in ids.tolist()])

    def fingerprint(self) -> str:
        """A hash of the name and the counts only, because hashing the samples would read the whole stream."""
        return hashlib.blake2b(f"stream {self.name} {self.counts}".encode(), digest_size=16).hexdigest()


def open_stream(parts: list[datasets.IterableDataset], image: str, label: str, name: str) -> StreamSource:
    """The source of one or two streams; a stream of unknown length is counted in one pass."""
    features = parts[0].features or datasets.Features()
    counts = [_count(part, label) for part in parts]
    raw = [part.cast_column(image, datasets.Image(decode=False)) for part in parts]
    return StreamSource(raw, counts, image, label, declared_classes(features, label), name)


def _count(part: datasets.IterableDataset, label: str) -> int:
    split = (part.info.splits or {}).get(str(part.split))
    if split is not None and split.num_examples:
        return split.num_examples
    return sum(1 for _ in part.select_columns([label]))


class Stream(IterableDataset[ImageBatch]):
    """Batches of the samples `ids`, decoded by `threads` threads (0: none), shuffled if a seed is given.

    The order is a function of seed and epoch: each iteration is one epoch, starting at ``epoch``; ``set_epoch`` sets the next one.
    Threads instead of processes: `datasets` would distribute its files over processes, which breaks the numbering.
    """

    def __init__(
        self,
        source: StreamSource,
        ids: Tensor,
        convert: Convert,
        batch_size: int,
        classes: int,
        threads: int = 0,
        seed: int | None = None,
        epoch: int = 0,
    ):
        self.source, self.ids, self.convert, self.batch_size = source, ids, convert, batch_size
        self.classes, self.threads, self.seed, self.epoch = classes, threads, seed, epoch

    def __len__(self) -> int:
        return math.ceil(len(self.ids) / self.batch_size)

    def __iter__(self) -> Iterator[ImageBatch]:
        rows = self.source.numbered(self.ids)
        if self.seed is not None:
            rows = _shuffled(rows, torch.Generator().manual_seed(seed_of(self.seed, "epoch", self.epoch)))
        self.epoch += 1
        if not self.threads:
            yield from self._batches(rows, map)
            return
        with ThreadPoolExecutor(self.threads) as pool:
            yield from self._batches(rows, pool.map)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        self.epoch = epoch

    def _batches(self, rows: Iterator[tuple[int, Any, int]], each: Any) -> Iterator[ImageBatch]:
        while group := list(islice(rows, self.batch_size)):
            ids, images, labels = zip(*group, strict=True)
            y = torch.tensor(labels)
            check_labels(y, self.classes)
            yield ImageBatch(self.convert.every(list(each(decoded, images))), y, torch.tensor(ids))


def _shuffled(rows: Iterator[Any], generator: torch.Generator) -> Iterator[Any]:
    """Each row once, drawn at random from a buffer that is refilled row by row."""
    buffer = list(islice(rows, _BUFFER))
    for row in rows:
        i = int(torch.randint(len(buffer), (), generator=generator))
        taken, buffer[i] = buffer[i], row
        yield taken
    yield from (buffer[i] for i in torch.randperm(len(buffer), generator=generator).tolist())
