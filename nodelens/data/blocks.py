"""Converts documents to samples: blocks of equal length, or one document per sample."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .selectors import Selector, without
from .sharing import shared
from .tokens import Tokenizer

_IGNORE = -100  # a label that does not count, as in cross_entropy
_GROUP = 64  # documents tokenised together
_CHUNK = 1 << 22  # tokens summed at once, because a stream may be memory-mapped


@dataclass(frozen=True)
class TokenStream:
    """The concatenated tokens of all documents, with BOS and EOS around each where requested."""

    ids: Tensor  # (N,)     int32
    nbytes: Tensor  # (N,)     int32  UTF-8 bytes of each token, 0 for special tokens
    starts: Tensor  # (d + 1,) int64  start of each document, then the end of the stream
    marks: Tensor | None = None  # (N,) bool   tokens that overlap a match of the selector

    @classmethod
    def of(
        cls, documents: Iterator[str], tokenizer: Tokenizer, bos: bool = False, eos: bool = False, most: int | None = None
    ) -> "TokenStream":
        """All tokens that a ``Reader`` yields."""
        return cls.join(Reader(tokenizer, bos, eos).read(documents, most))

    @classmethod
    def join(cls, parts: Iterable["TokenStream"]) -> "TokenStream":
        """Concatenate streams."""
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
        """The tokens first..last-1 and the documents that start among them, as views."""
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
    """Tokenises documents, adds BOS and EOS, and marks the tokens that overlap a match of the selector."""

    tokenizer: Tokenizer
    bos: bool = False
    eos: bool = False
    selector: Selector = field(default_factory=Selector)

    def read(self, documents: Iterator[str], most: int | None = None, share: bool = False) -> Iterator[TokenStream]:
        """Streams of some documents each, until there are ``most`` tokens (the last may be cut); skips empty documents.

        share: every process of a group reads the same documents, tokenises a share of them, and gets the tokens of the others.
        """
        left, groups = most, iter(lambda: list(islice(documents, _GROUP)), [])
        for part in shared(self._piece, groups) if share else map(self._piece, groups):
            whole = len(part)
            if left is not None:
                part, left = part if whole <= left else part.between(0, left), left - whole
            if len(part):
                yield part
            if left is not None and left <= 0:
                return

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
    """Samples: segments of a token stream, each optionally preceded by a prefix token such as BOS."""

    ids: Tensor  # (N,) int32  the stream
    first: Tensor  # (n,) int64  start of each sample in the stream
    size: Tensor  # (n,) int64  number of tokens without the prefix
    scored: Tensor  # (n,) int64  start of the tokens that no earlier sample predicts
    nbytes: Tensor  # (n,) int64  UTF-8 bytes of those tokens
    prefix: int | None = None
    pad: int = 0
    side: Literal["right", "left"] = "right"
    marks: Tensor | None = None  # (N,) bool, as in the stream
    selector: Selector = field(default_factory=Selector)
    special: tuple[int, ...] = ()  # token ids that do not count as rows

    def __len__(self) -> int:
        return len(self.first)

    def batch(self, samples: Tensor) -> dict[str, Tensor]:
        """The samples with these numbers, (B,), padded to the longest of them.

        input_ids (B, T); labels (B, T), the same ids for tokens to be predicted and -100 elsewhere; bytes (B,), UTF-8 bytes of
        the predicted tokens. With padding: attention_mask (B, T) and, for padding on the left, position_ids (B, T), which
        count real tokens only, because models otherwise number positions from the left of the row. A model with learned
        positions that takes no position_ids (TrOCR) needs padding on the right. If some real tokens are not selected:
        select (B, T) bool.
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
        """Numbers of tokens: padding (of batches in order), special tokens left out, not selected, and counted as rows."""
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
        """These samples followed by others of the same stream."""
        return replace(
            self,
            first=torch.cat([self.first, other.first]),
            size=torch.cat([self.size, other.size]),
            scored=torch.cat([self.scored, other.scored]),
            nbytes=torch.cat([self.nbytes, other.nbytes]),
        )

    def part(self, which: slice) -> "Samples":
        """A slice of the samples."""
        return replace(self, first=self.first[which], size=self.size[which], scored=self.scored[which], nbytes=self.nbytes[which])

    def within(self, stream: TokenStream, begin: int) -> "Samples":
        """Samples of a part that starts at ``begin`` of a stream, as samples of the whole stream."""
        return replace(self, ids=stream.ids, marks=stream.marks, first=self.first + begin, scored=self.scored + begin)

    def fingerprint(self) -> str:
        """A hash of the tokens, of their division into samples and of the selection."""
        chosen = "" if self.whole else f" {self.selector.text} {self.special}"
        digest = hashlib.blake2b(f"{self.prefix} {self.pad} {self.side}{chosen}".encode(), digest_size=16)
        for array in (self.ids, self.first, self.size, self.scored, self.nbytes):
            digest.update(array.numpy().data)
        return digest.hexdigest()


def packed(
    stream: TokenStream, length: int, stride: int | None = None, rest: bool = False, prefix: int | None = None, begun: bool = False
) -> Samples:
    """Blocks of ``length`` tokens, prefix included, that start every ``stride`` tokens; a shorter last one if ``rest``.

    stride None: blocks do not overlap. Each token is predicted once, by the first block with tokens before it.
    begun: the stream continues a text whose earlier blocks were already cut.
    """
    most = length - int(prefix is not None)
    stride = most if stride is None else stride
    first = torch.arange(0, max(0, len(stream) - (0 if rest else most - 1)), stride)
    size = (len(stream) - first).clamp_max(most)
    overlap = most - stride if begun else torch.where(first > 0, most - stride, 0)
    return _samples(stream, first, size, first + overlap, prefix)


def separate(stream: TokenStream, length: int, prefix: int | None = None) -> Samples:
    """One sample per document, cut to ``length`` tokens, prefix included."""
    first = stream.starts[:-1]
    size = stream.starts.diff().clamp_max(length - int(prefix is not None))
    return _samples(stream, first, size, first, prefix)


def _samples(stream: TokenStream, first: Tensor, size: Tensor, scored: Tensor, prefix: int | None) -> Samples:
    scored = scored if prefix is not None else torch.maximum(scored, first + 1)  # a first token without prefix is not predicted
    valid = scored < first + size  # drop samples without a token to predict
    first, size, scored = first[valid], size[valid], scored[valid]
    ends, begins = _sums_before(stream.nbytes, first + size, scored)
    nbytes = ends - begins
    return Samples(stream.ids, first, size, scored, nbytes, prefix, marks=stream.marks)


def _sums_before(values: Tensor, *places: Tensor) -> list[Tensor]:
    """Sums of the values before each of the ascending places, (n,) int64; reads the values once, in chunks."""
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
    """How many tokens of a stream are in no sample; starts and ends of the samples are ascending."""
    ends = samples.first + samples.size
    before = torch.cat([torch.zeros(1, dtype=torch.int64), ends])[:-1]
    return tokens - int((ends - torch.maximum(samples.first, before)).clamp_min(0).sum())
