"""From documents to samples: blocks of equal length, or a document each."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nodelens.data.tokens import Tokenizer, Tokens

_IGNORE = -100  # a label that does not count, as in cross_entropy
_AT_ONCE = 64  # documents that a tokenizer is given together


@dataclass(frozen=True)
class TokenStream:
    """The tokens of all documents, one after another, with the special ones around each."""

    ids: Tensor  # (N,)     int32
    nbytes: Tensor  # (N,)     int32  of the text that each token stands for, 0 for special ones
    starts: Tensor  # (d + 1,) int64  where each document begins; the last is the end

    @classmethod
    def of(
        cls, documents: Iterator[str], tokenizer: Tokenizer, bos: bool = False, eos: bool = False, most: int | None = None
    ) -> "TokenStream":
        """Reads documents until there are ``most`` tokens; empty ones are passed over. The last may be cut short."""
        parts: list[Tokens] = []
        total = 0
        while (most is None or total < most) and (group := list(islice(documents, _AT_ONCE))):
            read = [_framed(tokens, tokenizer, bos, eos) for tokens in tokenizer.encode(group) if len(tokens.ids)]
            total += sum(len(tokens.ids) for tokens in read)
            parts += read
        ids, nbytes = (np.concatenate([np.empty(0, np.int32), *(part[k] for part in parts)])[:most] for k in (0, 1))
        ends = np.minimum(np.cumsum([0, *(len(part.ids) for part in parts)]), len(ids))
        starts = torch.from_numpy(ends[: int((ends < len(ids)).sum()) + 1])
        return cls(torch.from_numpy(ids), torch.from_numpy(nbytes), starts)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def documents(self) -> int:
        return len(self.starts) - 1


def _framed(tokens: Tokens, tokenizer: Tokenizer, bos: bool, eos: bool) -> Tokens:
    first, last = [tokenizer.bos] if bos else [], [tokenizer.eos] if eos else []
    if not (first or last):
        return tokens
    around = np.asarray(first, np.int32), np.asarray(last, np.int32)
    ids = np.concatenate([around[0], tokens.ids, around[1]])
    return Tokens(ids, np.concatenate([0 * around[0], tokens.nbytes, 0 * around[1]]))


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

    def __len__(self) -> int:
        return len(self.first)

    def batch(self, samples: Tensor) -> dict[str, Tensor]:
        """The samples of these numbers, (B,), padded to the longest of them.

        input_ids (B, T); labels (B, T), the same ids where a token is to be predicted and -100 elsewhere; bytes (B,), what the
        predicted tokens stand for. Where there is padding: attention_mask (B, T) and, for padding on the left, position_ids
        (B, T) that count real tokens: models number positions from the left of the row unless told. One with learned positions
        that cannot be told (TrOCR) wants its padding on the right.
        """
        lead = int(self.prefix is not None)
        size = self.size[samples, None] + lead
        width = int(size.max())
        place = torch.arange(width) - (width - size if self.side == "left" else 0)
        real = (place >= 0) & (place < size)
        at = self.first[samples, None] + place - lead
        tokens = self.ids[at.where(real & (place >= lead), 0)].long()
        tokens = tokens.where(place >= lead, self.prefix or 0).where(real, self.pad)
        labels = tokens.where(real & (at >= self.scored[samples, None]), _IGNORE)
        found = {"input_ids": tokens, "labels": labels, "bytes": self.nbytes[samples]}
        if bool(real.all()):
            return found
        positions = {"position_ids": place.clamp_min(0).where(real, 0)} if self.side == "left" else {}
        return found | {"attention_mask": real.long(), **positions}

    def __add__(self, other: "Samples") -> "Samples":
        """The samples of another stream behind these."""
        return replace(
            self,
            ids=torch.cat([self.ids, other.ids]),
            first=torch.cat([self.first, other.first + len(self.ids)]),
            size=torch.cat([self.size, other.size]),
            scored=torch.cat([self.scored, other.scored + len(self.ids)]),
            nbytes=torch.cat([self.nbytes, other.nbytes]),
        )

    def fingerprint(self) -> str:
        """A hash of the tokens and of how they are cut."""
        digest = hashlib.blake2b(f"{self.prefix} {self.pad} {self.side}".encode(), digest_size=16)
        for array in (self.ids, self.first, self.size, self.scored, self.nbytes):
            digest.update(array.numpy().data)
        return digest.hexdigest()


def packed(stream: TokenStream, length: int, stride: int | None = None, rest: bool = False, prefix: int | None = None) -> Samples:
    """Blocks of ``length`` tokens, the prefix among them, that begin every ``stride`` tokens; the last, shorter one if ``rest``.

    The stride is that of blocks which do not overlap where it is None. A token is predicted once: by the first block that has
    tokens before it.
    """
    most = length - int(prefix is not None)
    stride = most if stride is None else stride
    first = torch.arange(0, max(0, len(stream) - (0 if rest else most - 1)), stride)
    size = (len(stream) - first).clamp_max(most)
    overlap = torch.where(first > 0, most - stride, 0)
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
    before = torch.cat([torch.zeros(1, dtype=torch.int64), stream.nbytes.cumsum(0)])
    return Samples(stream.ids, first, size, scored, before[first + size] - before[scored], prefix)
