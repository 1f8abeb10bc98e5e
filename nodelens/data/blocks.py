"""From documents to samples: blocks of equal length, or a document each."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .selectors import Selector, without
from .tokens import Tokenizer

_IGNORE = -100  # a label that does not count, as in cross_entropy
_GROUP = 64  # documents that a tokenizer is given together
_CHUNK = 1 << 22  # tokens that are added up at once: a stream may lie on a disk


@dataclass(frozen=True)
class TokenStream:
    """The tokens of all documents, one after another, with the special ones around each."""

    ids: Tensor  # (N,)     int32
    nbytes: Tensor  # (N,)     int32  of the text that each token stands for, 0 for special ones
    starts: Tensor  # (d + 1,) int64  where each document begins; the last is the end
    marks: Tensor | None = None  # (N,) bool   tokens at which the text is that a selector looks for

    @classmethod
    def of(
        cls, documents: Iterator[str], tokenizer: Tokenizer, bos: bool = False, eos: bool = False, most: int | None = None
    ) -> "TokenStream":
        """All that a ``Reader`` finds."""
        return cls.join(Reader(tokenizer, bos, eos).read(documents, most))

    @classmethod
    def join(cls, parts: Iterable["TokenStream"]) -> "TokenStream":
        """Streams one after another."""
        parts = list(parts)
        if len(parts) == 1:
            return parts[0]
        if not parts:
            nothing = torch.empty(0, dtype=torch.int32)
            return cls(nothing, nothing, torch.zeros(1, dtype=torch.int64))
        begins = np.cumsum([0, *map(len, parts)]).tolist()
        starts = [part.starts[:-1] + begin for part, begin in zip(parts, begins, strict=False)]
        marks = [part.marks for part in parts if part.marks is not None]
        return cls(
            torch.cat([part.ids for part in parts]),
            torch.cat([part.nbytes for part in parts]),
            torch.cat([*starts, torch.tensor(begins[-1:])]),
            torch.cat(marks) if marks else None,
        )

    def between(self, first: int, last: int) -> "TokenStream":
        """The tokens first..last-1 and the documents that begin there, without a copy."""
        inside = self.starts[(self.starts >= first) & (self.starts < last)]
        marks = None if self.marks is None else self.marks[first:last]
        starts = torch.cat([inside, torch.tensor([last])]) - first
        return TokenStream(self.ids[first:last], self.nbytes[first:last], starts, marks)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def documents(self) -> int:
        return len(self.starts) - 1


@dataclass(frozen=True)
class Reader:
    """Makes tokens of documents: special ones around each, marks where the selector's text is."""

    tokenizer: Tokenizer
    bos: bool = False
    eos: bool = False
    selector: Selector = field(default_factory=Selector)

    def read(self, documents: Iterator[str], most: int | None = None) -> Iterator[TokenStream]:
        """Some documents at a time, until there are ``most`` tokens; empty ones are passed over. The last may be cut short."""
        left = most
        while (left is None or left > 0) and (group := list(islice(documents, _GROUP))):
            part = self._piece(group)
            if left is not None:
                part, left = part if len(part) <= left else part.between(0, left), left - len(part)
            if len(part):
                yield part

    def _piece(self, texts: list[str]) -> TokenStream:
        first, last = (np.asarray([i] if asked else [], np.int32) for i, asked in self._special_ids())
        ids, nbytes, marks = [first[:0]], [first[:0]], [np.empty(0, bool)]
        sizes = [0]
        for text, tokens in zip(texts, self.tokenizer.encode(texts), strict=True):
            if len(tokens.ids):
                ids += [first, tokens.ids, last]
                nbytes += [0 * first, tokens.nbytes, 0 * last]
                if self.selector.words:
                    marks.append(np.pad(self.selector.marked(text, tokens.nbytes), (len(first), len(last))))
                sizes.append(len(first) + len(tokens.ids) + len(last))
        joined = [torch.from_numpy(np.concatenate(arrays)) for arrays in (ids, nbytes, marks)]
        return TokenStream(joined[0], joined[1], torch.tensor(sizes).cumsum(0), joined[2] if self.selector.words else None)

    def _special_ids(self) -> tuple[tuple[int | None, bool], tuple[int | None, bool]]:
        return (self.tokenizer.bos, self.bos), (self.tokenizer.eos, self.eos)


@dataclass(frozen=True)
class Samples:
    """Stretches of a stream of tokens. A prefix, such as BOS, stands before each."""

    ids: Tensor  # (N,) int32  the stream
    first: Tensor  # (n,) int64  where a sample begins in it
    size: Tensor  # (n,) int64  its tokens, the prefix left out
    scored: Tensor  # (n,) int64  where the tokens begin that it predicts and no sample before it did
    nbytes: Tensor  # (n,) int64  of the text that those stand for
    prefix: int | None = None
    pad: int = 0
    side: Literal["right", "left"] = "right"
    marks: Tensor | None = None  # (N,) bool, as in the stream
    selector: Selector = field(default_factory=Selector)
    special: tuple[int, ...] = ()  # ids that do not count as rows

    def __len__(self) -> int:
        return len(self.first)

    def batch(self, samples: Tensor) -> dict[str, Tensor]:
        """The samples of these numbers, (B,), padded to the longest of them.

        input_ids (B, T); labels (B, T), the same ids where a token is to be predicted and -100 elsewhere; bytes (B,), what the
        predicted tokens stand for. Where there is padding: attention_mask (B, T) and, for padding on the left, position_ids
        (B, T) that count real tokens: models number positions from the left of the row unless told. One with learned positions
        that cannot be told (TrOCR) wants its padding on the right. Where not every real token is selected: select (B, T) bool.
        """
        lead = int(self.prefix is not None)
        size = self.size[samples, None] + lead
        width = int(size.max())
        place = torch.arange(width) - (width - size if self.side == "left" else 0)
        real = (place >= 0) & (place < size)
        at = self.first[samples, None] + place - lead
        own = real & (place >= lead)
        tokens = self.ids[at.where(own, 0)].long()
        tokens = tokens.where(place >= lead, self.prefix or 0).where(real, self.pad)
        labels = tokens.where(real & (at >= self.scored[samples, None]), _IGNORE)
        found = {"input_ids": tokens, "labels": labels, "bytes": self.nbytes[samples]}
        if not self.whole:
            marks = None if self.marks is None else self.marks[at.where(own, 0)] & own
            found["select"] = without(self.selector(tokens, real, labels, marks), tokens, self.special)
        if bool(real.all()):
            return found
        positions = {"position_ids": place.clamp_min(0).where(real, 0)} if self.side == "left" else {}
        return found | {"attention_mask": real.long(), **positions}

    @property
    def whole(self) -> bool:
        """Whether every real token counts as a row."""
        return self.selector.trivial and not self.special

    def counts(self, batch_size: int) -> dict[str, int]:
        """Tokens of all samples by why they count as rows, or do not; padding is that of batches in order."""
        size = self.size + int(self.prefix is not None)
        rest = size[len(size) // batch_size * batch_size :]
        widest = size[: len(size) - len(rest)].reshape(-1, batch_size).amax(1).sum() * batch_size
        padding = int(widest) + (int(rest.max()) * len(rest) if len(rest) else 0) - int(size.sum())
        special, counted = 0, int(size.sum())
        if not self.whole:
            counted = 0
            for part in torch.arange(len(self)).split(256):
                batch = self.batch(part)
                real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
                special += int((real & ~without(real, batch["input_ids"], self.special)).sum())
                counted += int(batch["select"].sum())
        left = int(size.sum()) - special - counted
        return {"padding": padding, "special_left_out": special, "not_selected": left, "counted": counted}

    def __add__(self, other: "Samples") -> "Samples":
        """These samples and then others of the same stream."""
        return replace(
            self,
            first=torch.cat([self.first, other.first]),
            size=torch.cat([self.size, other.size]),
            scored=torch.cat([self.scored, other.scored]),
            nbytes=torch.cat([self.nbytes, other.nbytes]),
        )

    def part(self, which: slice) -> "Samples":
        """Some of the samples."""
        return replace(self, first=self.first[which], size=self.size[which], scored=self.scored[which], nbytes=self.nbytes[which])

    def within(self, stream: TokenStream, begin: int) -> "Samples":
        """The same samples, cut from a part that begins there, as samples of the whole stream."""
        return replace(self, ids=stream.ids, marks=stream.marks, first=self.first + begin, scored=self.scored + begin)

    def fingerprint(self) -> str:
        """A hash of the tokens, of how they are cut and of which count."""
        chosen = "" if self.whole else f" {self.selector.text} {self.special}"
        digest = hashlib.blake2b(f"{self.prefix} {self.pad} {self.side}{chosen}".encode(), digest_size=16)
        for array in (self.ids, self.first, self.size, self.scored, self.nbytes):
            digest.update(array.numpy().data)
        return digest.hexdigest()


def packed(
    stream: TokenStream, length: int, stride: int | None = None, rest: bool = False, prefix: int | None = None, begun: bool = False
) -> Samples:
    """Blocks of ``length`` tokens, the prefix among them, that begin every ``stride`` tokens; the last, shorter one if ``rest``.

    The stride is that of blocks which do not overlap where it is None. A token is predicted once: by the first block that has
    tokens before it. begun: blocks of the same text were cut before, up to the one that begins with the stream.
    """
    most = length - int(prefix is not None)
    stride = most if stride is None else stride
    first = torch.arange(0, max(0, len(stream) - (0 if rest else most - 1)), stride)
    size = (len(stream) - first).clamp_max(most)
    overlap = most - stride if begun else torch.where(first > 0, most - stride, 0)
    return _samples(stream, first, size, first + overlap, prefix)


def separate(stream: TokenStream, length: int, prefix: int | None = None) -> Samples:
    """A document each, cut to ``length`` tokens with the prefix among them."""
    first = stream.starts[:-1]
    size = stream.starts.diff().clamp_max(length - int(prefix is not None))
    return _samples(stream, first, size, first, prefix)


def _samples(stream: TokenStream, first: Tensor, size: Tensor, scored: Tensor, prefix: int | None) -> Samples:
    scored = scored if prefix is not None else torch.maximum(scored, first + 1)  # nothing predicts a first token
    some = scored < first + size  # a sample with nothing to predict is none
    first, size, scored = first[some], size[some], scored[some]
    ends, begins = _sums_before(stream.nbytes, first + size, scored)
    nbytes = ends - begins
    return Samples(stream.ids, first, size, scored, nbytes, prefix, marks=stream.marks)


def _sums_before(values: Tensor, *places: Tensor) -> list[Tensor]:
    """Sums of the values before each place, (n,) int64, in ascending order; the values are read once, a stretch at a time."""
    found = [torch.zeros_like(place) for place in places]
    total = 0
    for begin in range(0, len(values), _CHUNK):
        sums = torch.from_numpy(values[begin : begin + _CHUNK].numpy().cumsum(dtype=np.int64))
        edges = torch.tensor([begin, begin + len(sums)])
        for place, sum_ in zip(places, found, strict=True):
            a, b = torch.searchsorted(place, edges, right=True).tolist()
            sum_[a:b] = total + sums[place[a:b] - begin - 1]
        total += int(sums[-1])
    return found


def unused(samples: Samples, tokens: int) -> int:
    """How many of a stream's tokens are in no sample; those begin and end in ascending order."""
    ends = samples.first + samples.size
    before = torch.cat([torch.zeros(1, dtype=torch.int64), ends])[:-1]
    return tokens - int((ends - torch.maximum(samples.first, before)).clamp_min(0).sum())
