"""The data module for texts: samples of tokens for causal language models."""

import hashlib
from dataclasses import replace
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nodelens.messages import either, setting

from .blocks import Reader, Samples, TokenStream, packed, separate, unused
from .cache import Parts, cached
from .corpus import Corpus
from .selectors import Selector, check_exact
from .split_data import SplitData, silence_warnings
from .splits import make_splits, shard, write_splits
from .textstream import Blocks, TextStream, nothing_selected
from .tokens import Tokenizer, open_tokenizer

TextBatch = dict[str, Tensor]


class Text(SplitData):
    """Tokenised texts, cut into samples, with disjoint train, val, test and calibration splits of the samples.

    A batch is a dict: input_ids and labels (B, T), bytes (B,), ids (B,); if it is padded, attention_mask and, for padding on
    the left, position_ids (B, T); if some tokens do not count as rows, select (B, T). See ``Samples.batch``.

    path, name, text_key, separator, train_split, test_split: the documents; see ``Corpus``
    streaming:   read in order without storing. With mode=pack, blocks are cut while documents arrive, in constant memory, and
                 the only split is "all". With mode=pad the tokens are kept in memory and split
    documents, max_tokens: largest number read from each part; None: all
    tokenizer:   a folder or hub id with a tokenizer of transformers; None: UTF-8 bytes (256 + BOS, EOS, padding)
    mode:        pack: documents are concatenated and cut into blocks of exactly `length` tokens; pad: one sample per document,
                 cut to `length`, padded on `side`
    stride:      tokens between the starts of consecutive blocks; None: no overlap. Each token is predicted once
    remainder:   drop: tokens after the last whole block are left out; keep: they form one shorter block
    bos:         document: before each document; block: before each sample; None: nowhere. eos: after each document
    select:      which tokens count as rows, such as last, n//2: or phrase:<text>; see ``Selector``. Losses do not change
    special:     drop: BOS, EOS and padding ids of the tokenizer do not count as rows
    cache:       a folder in which tokens are stored and memory-mapped for later runs; None: no cache
    classes:     vocabulary size of the model, at least that of the tokenizer; None: that of the tokenizer
    val, test, calibration, seed, workers: as in ``ImageData``
    Raises: in `setup`, FileNotFoundError if text or tokenizer are not available; ValueError for unsuitable options.
    """

    def __init__(
        self,
        path: str | None = None,
        name: str | None = None,
        *,
        text_key: str = "text",
        separator: str | None = None,
        train_split: str = "train",
        test_split: str | None = None,
        streaming: bool = False,
        documents: int | None = None,
        max_tokens: int | None = None,
        tokenizer: str | None = None,
        mode: Literal["pack", "pad"] = "pack",
        length: int = 256,
        stride: int | None = None,
        remainder: Literal["drop", "keep"] = "drop",
        bos: Literal["document", "block"] | None = "document",
        eos: bool = False,
        side: Literal["right", "left"] = "right",
        select: str | int = "all",
        special: Literal["keep", "drop"] = "keep",
        cache: str | None = None,
        classes: int | None = None,
        batch_size: int = 16,
        val: float = 0.1,
        test: float = 0.2,
        calibration: int = 128,
        seed: int = 0,
        workers: int = 0,
    ):
        super().__init__(batch_size, workers, seed, val, test, calibration)
        self.corpus = Corpus(path, name, text_key, separator, train_split, test_split, streaming)
        self.documents, self.max_tokens, self.tokenizer = documents, max_tokens, tokenizer
        self.mode, self.length, self.stride, self.remainder = mode, length, stride, remainder
        self.bos, self.eos, self.side, self.classes = bos, eos, side, classes
        self.select, self.special, self.cache = select, special, cache
        self.source: Samples | None = None
        self.blocks: Blocks | None = None  # of a streamed text
        # numbers of documents, tokens and bytes read, of unused tokens, and of tokens in samples by kind: padding, special ones
        # left out, not selected, counted. Empty for a stream
        self.counts: dict[str, int] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read, tokenise, cut and split; the second call does nothing. Collective: processes share the work."""
        silence_warnings()
        if self.source is not None or self.blocks is not None:
            return
        self._check()
        tokenizer = open_tokenizer(self.tokenizer)
        self._check_tokenizer(tokenizer)
        reader = Reader(tokenizer, self.bos == "document", self.eos, Selector.parse(self.select))
        check_exact(tokenizer, reader.selector)
        if self.corpus.streaming and self.mode == "pack":
            self.blocks, self.unsplit = self._stream(reader), True
        else:
            self._hold(reader)
        self.classes = self.classes or tokenizer.size

    def _hold(self, reader: Reader) -> None:
        """Make all samples and assign them to splits."""
        if self.cache is None:
            stream, edges = self._read(reader)
        else:
            stream, edges = cached(self.cache, self._about(reader), lambda: self._read(reader))
        parts = [self._cut(stream, a, b, reader) for a, b in pairwise(edges)]
        if not self.counts["counted"]:
            raise ValueError(nothing_selected(reader.selector.text, self._name))
        own_test = sum(len(part) for part in parts[1:])
        self.unsplit = len(parts) == 1
        self.indices = make_splits(len(parts[0]), own_test, seed=self.seed, **self.shares)
        self.source = parts[0] if self.unsplit else parts[0] + parts[1]

    def numbered(self, ids: Tensor) -> Dataset[TextBatch]:
        return _Numbered(self._ready(), ids)

    def loader(self, split: str, rank: int = 0, world: int = 1, batch_size: int | None = None) -> DataLoader[TextBatch]:
        """As of images; a streamed text has the split "all" only."""
        self.setup()
        if self.blocks is not None and split == "all":
            shard(torch.empty(0), rank, world)  # validates rank and world
            return _in_order(TextStream(self.blocks, batch_size or self.batch_size, rank, world), self.workers)
        return super().loader(split, rank, world, batch_size)

    def save_splits(self, folder: str | Path) -> Path:
        """Write `splits.json` into `folder`: fingerprint, seed, counts, sizes, and the sample numbers of all splits but train."""
        about = {"fingerprint": self.fingerprint(), "seed": self.seed, "counts": self.counts}
        return write_splits(folder, self.indices, about)

    def fingerprint(self) -> str:
        """A hash of the tokens of all samples; for a stream, which is not read for it, of the options."""
        self.setup()
        if self.blocks is None:
            return self._ready().fingerprint()
        asked = {k: v for k, v in vars(self.blocks).items() if k not in ("documents", "reader")}
        asked |= {"corpus": self.corpus, "first": self.documents, "tokenizer": self.blocks.reader.tokenizer.fingerprint()}
        asked |= {"bos": self.bos, "eos": self.eos, "select": self.select}
        return hashlib.blake2b(f"stream {asked}".encode(), digest_size=16).hexdigest()

    def _ids(self, split: str) -> Tensor:
        self.setup()
        if self.blocks is not None:
            raise ValueError(
                f"there is no split '{split}': with {setting('dataset.streaming', True)} and "
                f"{setting('dataset.mode', 'pack')} the only split is 'all'; set {setting('dataset.streaming', False)}"
            )
        return super()._ids(split)

    def _ready(self) -> Samples:
        self.setup()
        assert self.source is not None
        return self.source

    def _read(self, reader: Reader) -> Parts:
        """All tokens, and the edges of the parts."""
        texts = [islice(part, self.documents) for part in self.corpus.open()]
        share = self.cache is None  # with a cache one process tokenises, and the others wait
        parts = [TokenStream.join(reader.read(part, self.max_tokens, share)) for part in texts]
        return TokenStream.join(parts), [0, *accumulate(map(len, parts))]

    def _stream(self, reader: Reader) -> Blocks:
        self.corpus.open()  # raises if the text is not available
        prefix = reader.tokenizer.bos if self.bos == "block" else None
        special = reader.tokenizer.special if self.special == "drop" else ()
        return Blocks(
            lambda: islice(self.corpus.open()[0], self.documents),
            reader,
            self.length,
            self.stride,
            self.remainder == "keep",
            prefix,
            self.max_tokens,
            self.side,
            special,
            self._name,
        )

    def _about(self, reader: Reader) -> dict[str, Any]:
        """Plain values that determine the tokens and their marks."""
        marks = [repr(words) for words in reader.selector.words]
        limits = {"documents": self.documents, "max_tokens": self.max_tokens, "bos": reader.bos, "eos": reader.eos}
        return {"corpus": self.corpus.fingerprint(), "tokenizer": reader.tokenizer.fingerprint(), "marks": marks, **limits}

    def _cut(self, whole: TokenStream, begin: int, end: int, reader: Reader) -> Samples:
        """The samples of one part."""
        stream, tokenizer = whole.between(begin, end), reader.tokenizer
        if not len(stream):
            raise ValueError(f"{self._name} contains no text; set {setting('dataset.path')}")
        prefix = tokenizer.bos if self.bos == "block" else None
        if self.mode == "pad":
            samples = separate(stream, self.length, prefix)
        else:
            samples = packed(stream, self.length, self.stride, self.remainder == "keep", prefix)
        if not len(samples):
            fix = f"lower {setting('dataset.length')}"
            raise ValueError(f"{self._name} has {len(stream)} tokens, fewer than one block of {self.length}; {fix}")
        special = tokenizer.special if self.special == "drop" else ()
        samples = replace(samples, pad=tokenizer.pad, side=self.side, selector=reader.selector, special=special)
        self._count(stream, samples)
        return samples.within(whole, begin)

    def _count(self, stream: TokenStream, samples: Samples) -> None:
        left_out = unused(samples, len(stream))
        found = {"documents": stream.documents, "tokens": len(stream), "bytes": int(stream.nbytes.sum()), "unused_tokens": left_out}
        if self.mode == "pad":
            found["cut_documents"] = int((stream.starts.diff() > self.length - (self.bos == "block")).sum())
        found |= samples.counts(self.batch_size)
        self.counts = {name: self.counts.get(name, 0) + n for name, n in found.items()}

    def _check(self) -> None:
        """Raises ValueError for numbers out of range."""
        if self.length < 2:
            why = "a token is predicted from an earlier one: give 2 or more"
            raise ValueError(f"{setting('dataset.length')} is {self.length}; {why}")
        most = self.length - (self.bos == "block")
        if self.stride is not None and not (self.mode == "pack" and 1 <= self.stride <= most):
            mode = setting("dataset.mode", "pack")
            raise ValueError(f"{setting('dataset.stride')} is {self.stride}; it is 1 to {most} tokens, and for {mode} only")
        for name in ("documents", "max_tokens"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ValueError(f"{setting(f'dataset.{name}')} is {limit}; it is 1 or more, or {either('None', 'null')} for all")
        if self.cache is not None and self.corpus.streaming:
            both = f"{setting('dataset.cache')} stores tokens and {setting('dataset.streaming', True)} stores nothing"
            raise ValueError(f"{both}; set only one of the two")

    def _check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError if a requested special token is missing, or the vocabulary exceeds that of the model."""
        for name, wanted, token in (("bos", self.bos, tokenizer.bos), ("eos", self.eos, tokenizer.eos)):
            if wanted and token is None:
                off = setting(f"dataset.{name}", None if name == "bos" else False)
                raise ValueError(f"the tokenizer '{self.tokenizer}' has no {name.upper()} token; set {off}")
        if self.classes is not None and tokenizer.size > self.classes:
            which = f"the tokenizer '{self.tokenizer}'" if self.tokenizer else "the byte-level tokenizer"
            raise ValueError(
                f"{which} has {tokenizer.size} ids, more than {setting('dataset.classes', self.classes)}; "
                f"set {setting('dataset.tokenizer')} to the model's own"
            )

    @property
    def stored_tokenizer(self) -> Any:
        """The tokenizer of transformers, which can be saved with a model; None for bytes."""
        return getattr(open_tokenizer(self.tokenizer), "tokenizer", None)

    @property
    def _name(self) -> str:
        return "the embedded text" if self.corpus.path is None else f"'{self.corpus.path}'"


class _Numbered(Dataset[TextBatch]):
    """The samples `ids` of a source; a loader requests a whole batch of positions at once."""

    def __init__(self, source: Samples, ids: Tensor):
        self.source, self.ids = source, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, position: int) -> TextBatch:
        return {name: value[0] for name, value in self.__getitems__([position]).items()}

    def __getitems__(self, positions: list[int]) -> TextBatch:
        ids = self.ids[torch.as_tensor(positions)]
        return {**self.source.batch(ids), "ids": ids}


def _in_order(stream: TextStream, workers: int) -> DataLoader[TextBatch]:
    """Batches in order; at most one worker prefetches, because every worker would read the whole text."""
    return DataLoader(stream, batch_size=None, num_workers=min(1, workers), pin_memory=torch.cuda.is_available())
