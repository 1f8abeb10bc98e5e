r"""Selects the tokens that count as rows: ``last``, ``n//2:``, ``phrase:Once upon``, ``regex:[0-9]+ & -1``; losses stay."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import regex
import torch
from torch import Tensor

from nodelens.network.expressions import parse_index

from .tokens import as_tokenizer, in_bytes

_IGNORE = -100  # a label that does not count, as in cross_entropy
_KINDS = "all, loss, last, positions such as 0, -1 or n//2:, phrase:<text>, regex:<pattern>; several joined by ' & '"
_SECONDS = 10.0  # for the matches of a pattern in one document
_LENGTHS = (4, 1_000, 100_000)  # sample lengths, in one of which a position must select something
_WORDS = re.compile(r"[a-zA-Z_]{2,}|[a-mo-zA-Z_]")  # letters that occur in no position expression


@dataclass(frozen=True)
class Selector:
    r"""Terms joined by `` & ``; a token is selected if it meets all of them.

    all:               every token
    loss:              tokens that predict the next one: its label is valid and it is not padding
    last, 0, n//2:, …  positions among the n real tokens of a sample, BOS included, in the syntax of ``parse_index``; the same for
                       padding on either side. A position beyond the end of a short sample selects nothing in it
    phrase:<text>      tokens that overlap an occurrence of the text; case-sensitive
    regex:<pattern>    tokens that overlap a match, in the syntax of Python's ``re``; a document that takes longer than 10 seconds,
                       by catastrophic backtracking, is an error

    To use `` & `` inside a phrase or pattern, write a regex with ``\x26``. Matches are searched in whole documents, not samples.

    >>> Selector.parse("loss & n//2:")(torch.zeros(1, 4), labels=torch.tensor([[1, 2, 3, 4]]))
    tensor([[False, False,  True, False]])
    """

    text: str = "all"
    loss: bool = False
    places: tuple[str, ...] = ()
    words: tuple["_Words", ...] = ()

    @classmethod
    def parse(cls, text: str | int) -> "Selector":
        """Raises ValueError for a term that is unknown, never selects a position or does not compile."""
        terms = [term.lstrip() for term in str(text).split(" & ")]
        words = tuple(_Words.parse(term) for term in terms if term.startswith(("phrase:", "regex:")))
        rest = [term.strip() for term in terms if not term.startswith(("phrase:", "regex:"))]
        places = tuple("-1" if term == "last" else term for term in rest if term not in ("all", "loss"))
        for term in places:
            _check_places(term)
        return cls(str(text), "loss" in rest, places, words)

    @property
    def trivial(self) -> bool:
        """Whether every token is selected."""
        return not (self.loss or self.places or self.words)

    def __call__(
        self, ids: Tensor, mask: Tensor | None = None, labels: Tensor | None = None, marks: Tensor | None = None
    ) -> Tensor:
        """The selected real tokens, (B, T) bool.

        Shapes: ids, mask (1 or True: not padding), labels (the ids, -100 for tokens not predicted), marks (bool, from
        ``marked``): (B, T) each. Raises ValueError if the selector needs labels or marks that are not given.
        """
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        found = real
        if self.loss:
            if labels is None:
                raise ValueError(f"selector {self.text!r} needs the loss, but the batch has no labels: give labels (B, T)")
            predicts = (labels[:, 1:] != _IGNORE) & real[:, 1:]
            found = found & torch.nn.functional.pad(predicts, (0, 1))
        for term in self.places:
            found = found & _position_mask(term, real)
        if self.words:
            if marks is None:
                raise ValueError(f"selector {self.text!r} searches text, but the batch has no text")
            found = found & marks.to(found.device)
        return found

    def marked(self, text: str, nbytes: np.ndarray) -> np.ndarray:
        """(n,) bool: the tokens of a document that overlap all phrases and patterns; nbytes (n,): UTF-8 bytes per token."""
        found = np.ones(len(nbytes), bool)
        for words in self.words:
            found &= _overlapping(in_bytes(text, words.spans(text)), nbytes)
        return found


@dataclass(frozen=True)
class _Words:
    """A pattern; for a phrase also its length, as its pattern only matches starts, so that occurrences may overlap."""

    pattern: regex.Pattern[str]
    length: int | None = None

    @classmethod
    def parse(cls, term: str) -> "_Words":
        kind, _, words = term.partition(":")
        if not words:
            raise ValueError(f"selector {term!r} is empty: give a text after the colon")
        if kind == "phrase":
            return cls(regex.compile(f"(?={re.escape(words)})"), len(words))
        try:
            re.compile(words)  # the syntax is that of re: regex has more
            return cls(regex.compile(words))
        except (re.error, regex.error, OverflowError, RecursionError) as error:
            raise ValueError(f"selector {term!r} is not a regular expression: {error}") from None

    def spans(self, text: str) -> np.ndarray:
        """Start and end of each occurrence in characters, (k, 2). Raises ValueError for a pattern that takes too long."""
        try:
            matches = list(self.pattern.finditer(text, timeout=_SECONDS))
        except TimeoutError:
            raise ValueError(
                f"selector 'regex:{self.pattern.pattern}' takes more than {_SECONDS:g} seconds on a text of {len(text)} characters:"
                " nested repetitions such as (a+)+ try every division of the text; write a pattern without them"
            ) from None
        found = [(m.start(), m.end() if self.length is None else m.start() + self.length) for m in matches]
        return np.asarray([span for span in found if span[0] < span[1]], np.int64).reshape(-1, 2)


def select_tokens(
    ids: Tensor,
    selector: str | int = "all",
    *,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    special: Literal["keep", "drop"] = "keep",
    tokenizer: Any = None,
    texts: Sequence[str] | None = None,
) -> Tensor:
    """The tokens of a batch that count as rows, (B, T) bool, for the key ``select`` of a custom batch.

    ids, mask, labels: (B, T), as in ``Selector``, which also describes the selectors
    special:   drop: BOS, EOS and padding ids of the tokenizer never count
    tokenizer: a tokenizer of transformers (a fast one for phrases and patterns), or ``ByteTokenizer``
    texts:     (B,) the text of each sample, for phrases and patterns; None: the ids, decoded
    Raises: ValueError for an invalid selector, for missing arguments that it needs, or ids that do not belong to the text.
    """
    chosen = Selector.parse(selector)
    if special not in ("keep", "drop"):
        raise ValueError(f"special is {special!r}; it is keep or drop")
    if tokenizer is None and (chosen.words or special == "drop"):
        raise ValueError(f"selector {chosen.text!r} with special={special} needs the tokenizer: give tokenizer=")
    known = None if tokenizer is None else as_tokenizer(tokenizer)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    plain = real if known is None else without(real, ids, known.special)
    marks = _marks_of(chosen, ids, plain, known, texts) if chosen.words else None
    return chosen(ids, real, labels, marks) & (plain if special == "drop" else real)


def without(mask: Tensor, ids: Tensor, special: Iterable[int]) -> Tensor:
    """The mask without tokens of these ids."""
    for token in special:
        mask = mask & (ids != token)
    return mask


def _marks_of(selector: Selector, ids: Tensor, plain: Tensor, tokenizer: Any, texts: Sequence[str] | None) -> Tensor:
    """Marks of the matches in the text of each sample, at its tokens that are neither padding nor special."""
    check_exact(tokenizer, selector)
    own = [row[keep].tolist() for row, keep in zip(ids.cpu(), plain.cpu(), strict=True)]
    texts = [tokenizer.decode(row) for row in own] if texts is None else list(texts)
    if len(texts) != len(ids):
        raise ValueError(f"a batch has {len(ids)} samples and {len(texts)} texts: give one text per sample")
    marks = torch.zeros(plain.shape, dtype=torch.bool)
    for k, (text, tokens) in enumerate(zip(texts, tokenizer.encode(texts), strict=True)):
        if tokens.ids[: len(own[k])].tolist() != own[k]:
            raise ValueError(f"the ids of sample {k} are not the tokens of its text: give the original texts=")
        marks[k, plain[k].cpu()] = torch.from_numpy(selector.marked(text, tokens.nbytes)[: len(own[k])])
    return marks


def check_exact(tokenizer: Any, selector: Selector) -> None:
    """Raises ValueError if the selector searches text and the tokenizer gives no character offsets."""
    if selector.words and not tokenizer.exact:
        raise ValueError(
            f"selector {selector.text!r} searches text, but this tokenizer gives no character offsets: "
            "use a fast one (a folder with tokenizer.json), or bytes"
        )


def _check_places(term: str) -> None:
    if _WORDS.search(term) or not term:
        raise ValueError(f"no selector is called {term!r}; choose from {_KINDS}")
    for item in term.split(","):
        for n in _LENGTHS:
            try:
                parse_index(item, n)
                break
            except ValueError as error:
                reason = str(error).partition(": ")[2]
        else:
            raise ValueError(f"selector {term!r} selects no token in samples of any length: {reason}")


@lru_cache(maxsize=4096)
def _positions_of(term: str, n: int) -> list[int]:
    """The positions of a term among n tokens; positions out of range are left out."""
    found: list[int] = []
    for item in term.split(","):
        try:
            found += parse_index(item, n)
        except ValueError:  # it was parsed before, so n is too small
            continue
    return found


def _position_mask(term: str, real: Tensor) -> Tensor:
    """(B, T) bool: real tokens at the positions of a term, which is parsed once per sample length."""
    lengths, row = real.sum(1).unique(return_inverse=True)
    table = torch.zeros(len(lengths), real.shape[1], dtype=torch.bool)
    for k, n in enumerate(lengths.tolist()):
        table[k, _positions_of(term, n)] = True
    place = (real.cumsum(1) - 1).clamp_min(0)
    return table.to(real.device)[row[:, None], place] & real


def _overlapping(spans: np.ndarray, nbytes: np.ndarray) -> np.ndarray:
    """(n,) bool: tokens that share a byte with a span (k, 2); a token without bytes completes the character before it."""
    ends = nbytes.cumsum(dtype=np.int64)
    first, end = np.searchsorted(ends, spans[:, 0], "right"), np.searchsorted(ends - nbytes, spans[:, 1], "left")
    change = np.zeros(len(nbytes) + 1, np.int64)
    np.add.at(change, first, 1)
    np.add.at(change, end, -1)
    found = change[:-1].cumsum() > 0
    owner = np.maximum.accumulate(np.where(nbytes > 0, np.arange(len(nbytes)), -1)) if len(nbytes) else ends
    return found[owner] & (owner >= 0)
