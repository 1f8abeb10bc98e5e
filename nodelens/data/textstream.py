"""Cuts blocks while documents arrive: the same blocks as of the whole text, in constant memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from nodelens.messages import setting

from .blocks import Reader, Samples, TokenStream, packed

_BUFFER = 1 << 16  # smallest number of tokens buffered before blocks are cut


@dataclass(frozen=True)
class Blocks:
    """How a text is read and cut into blocks; `documents` opens it from the start, up to `most` tokens are read."""

    documents: Callable[[], Iterator[str]]
    reader: Reader
    length: int
    stride: int | None = None
    rest: bool = False
    prefix: int | None = None
    most: int | None = None
    side: Literal["right", "left"] = "right"
    special: tuple[int, ...] = ()
    name: str = "the text"

    def cut(self, least: int) -> Iterator[Samples]:
        """All blocks in order, at least ``least`` at a time, except for the last part."""
        size = self.length - int(self.prefix is not None)
        stride = self.stride or size
        wanted = max(_BUFFER, size + stride * least)
        held, begun = list[TokenStream](), False
        for part in self.reader.read(self.documents(), self.most):
            held.append(part)
            if sum(map(len, held)) >= wanted:
                stream = TokenStream.join(held)
                samples = self._samples(stream, rest=False, begun=begun)
                yield samples
                held, begun = [stream.between(len(samples) * stride, len(stream))], True
        samples = self._samples(TokenStream.join(held), self.rest, begun)
        if len(samples):
            yield samples

    def _samples(self, stream: TokenStream, rest: bool, begun: bool) -> Samples:
        samples = packed(stream, self.length, self.stride, rest, self.prefix, begun)
        tokenizer, selector = self.reader.tokenizer, self.reader.selector
        return replace(samples, pad=tokenizer.pad, side=self.side, selector=selector, special=self.special)


class TextStream(IterableDataset[dict[str, Tensor]]):
    """Batches of the blocks i with i % world == rank, in order, with the block numbers i as `ids`.

    Every process reads and tokenises the whole text. Raises ValueError at the end if there was no block, or if the selector
    selected no token.
    """

    def __init__(self, blocks: Blocks, batch_size: int, rank: int = 0, world: int = 1):
        self.blocks, self.batch_size, self.rank, self.world = blocks, batch_size, rank, world

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        total = own = selected = 0
        for numbers, samples in self._rounds():
            mine = torch.arange(len(numbers))[self.rank :: self.world]
            for part in mine.split(self.batch_size) if len(mine) else ():
                batch = samples.batch(part) | {"ids": numbers[part]}
                selected += int(batch["select"].sum()) if "select" in batch else len(part)
                own += len(part)
                yield batch
            total += len(numbers)
        if not total:
            fix = f"lower {setting('dataset.length')}"
            raise ValueError(f"{self.blocks.name} has less than one block of {self.blocks.length} tokens; {fix}")
        if own and not selected and self.world == 1:
            raise ValueError(nothing_selected(self.blocks.reader.selector.text, self.blocks.name))

    def _rounds(self) -> Iterator[tuple[Tensor, Samples]]:
        """Numbered blocks, in multiples of one batch for every process; at the end the remaining ones."""
        step, begin = self.batch_size * self.world, 0
        buffered: Samples | None = None
        for samples in self.blocks.cut(step):
            buffered = samples if buffered is None else _append(buffered, samples)
            whole = len(buffered) // step * step
            if whole:
                yield torch.arange(begin, begin + whole), buffered.part(slice(whole))
                begin, buffered = begin + whole, buffered.part(slice(whole, None))
        if buffered is not None and len(buffered):
            yield torch.arange(begin, begin + len(buffered)), buffered


def nothing_selected(selector: str, name: str) -> str:
    """The error message if no token counts as a row."""
    fix = f"give another selector, or {setting('dataset.special', 'keep')}"
    return f"{setting('dataset.select')}={selector!r} selects no token of {name}; {fix}"


def _append(samples: Samples, other: Samples) -> Samples:
    """Append samples of another stream, and drop tokens of the first stream that are no longer needed."""
    begin = int(samples.first[0]) if len(samples) else len(samples.ids)
    kept = len(samples.ids) - begin
    marks = None if samples.marks is None else torch.cat([samples.marks[begin:], other.marks])  # type: ignore[list-item]
    stream = TokenStream(torch.cat([samples.ids[begin:], other.ids]), torch.empty(0), torch.empty(0), marks)
    return samples.within(stream, -begin) + other.within(stream, kept)
