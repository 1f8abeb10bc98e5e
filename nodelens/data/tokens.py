"""Tokenizers: plain UTF-8 bytes, or the tokenizer of a model, with the number of bytes that each token covers."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from nodelens.messages import either, setting


class Tokens(NamedTuple):
    """The tokens of a document."""

    ids: np.ndarray  # (n,) int32
    nbytes: np.ndarray  # (n,) int32, UTF-8 bytes of each token; they sum to the document's bytes


class Tokenizer(Protocol):
    """The interface of a tokenizer; bos and eos are None if it has no such token."""

    @property
    def size(self) -> int:
        """The largest id plus one."""
        ...

    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int | None: ...
    @property
    def pad(self) -> int: ...
    @property
    def special(self) -> tuple[int, ...]:
        """The existing ids of BOS, EOS and padding."""
        ...

    @property
    def exact(self) -> bool:
        """Whether the bytes per token are exact, and not an equal share."""
        ...

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of each text, without special tokens."""
        ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def fingerprint(self) -> str:
        """A hash of everything that determines the tokens of a text."""
        ...


@dataclass(frozen=True)
class ByteTokenizer:
    """Byte-level tokenizer: UTF-8 bytes are ids 0 to 255, then BOS, EOS and padding. It needs no file.

    >>> tokens = ByteTokenizer().encode(["é!"])[0]
    >>> tokens.ids.tolist(), ByteTokenizer().decode(tokens.ids)
    ([195, 169, 33], 'é!')
    """

    size: int = 259
    bos: int = 256
    eos: int = 257
    pad: int = 258
    special: tuple[int, ...] = (256, 257, 258)
    exact: bool = True

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        every = [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]
        return [Tokens(ids, np.ones_like(ids)) for ids in every]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special ids; invalid UTF-8 becomes U+FFFD."""
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")

    def fingerprint(self) -> str:
        return "bytes"


@dataclass(frozen=True)
class StoredTokenizer:
    """A tokenizer of transformers."""

    tokenizer: Any
    size: int
    bos: int | None
    eos: int | None
    pad: int
    special: tuple[int, ...] = ()

    @classmethod
    def of(cls, path: str) -> "StoredTokenizer":
        """The tokenizer in a folder or of a hub id.

        Raises: FileNotFoundError, in one line, if it is not available; ValueError if it cannot be built.
        """
        return cls.around(_opened(path))

    @classmethod
    def around(cls, tokenizer: Any) -> "StoredTokenizer":
        """Wrap a loaded tokenizer."""
        bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        special = tuple(dict.fromkeys(i for i in (bos, eos, pad) if i is not None))
        pad = next((i for i in (pad, eos) if i is not None), 0)  # any id will do, because padding is masked
        return cls(tokenizer, max(tokenizer.get_vocab().values()) + 1, bos, eos, pad, special)

    @property
    def exact(self) -> bool:
        return bool(self.tokenizer.is_fast)

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        fast = self.tokenizer.is_fast  # slow tokenizers give no offsets
        options = {"return_offsets_mapping": True} if fast else {}
        found = self.tokenizer(list(texts), add_special_tokens=False, verbose=False, **options)
        every = []
        for k, (text, ids) in enumerate(zip(texts, found["input_ids"], strict=True)):
            ends = [end for _, end in found["offset_mapping"][k]] if fast else _even_ends(len(ids), len(text))
            every.append(Tokens(np.asarray(ids, np.int32), _bytes_of(text, np.asarray(ends, np.int64))))
        return every

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""
        return self.tokenizer.decode(list(ids))

    def fingerprint(self) -> str:
        if self.exact:
            described = self.tokenizer.backend_tokenizer.to_str()
        else:
            described = repr((type(self.tokenizer), sorted(self.tokenizer.get_vocab().items()), self.tokenizer.init_kwargs))
        return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()


def open_tokenizer(path: str | None) -> Tokenizer:
    """The byte-level tokenizer, or the one at a path. Raises the errors of ``StoredTokenizer.of``."""
    return ByteTokenizer() if path is None else StoredTokenizer.of(path)


def as_tokenizer(tokenizer: Any) -> Tokenizer:
    """The tokenizer itself, or a wrapped tokenizer of transformers."""
    return StoredTokenizer.around(tokenizer) if hasattr(tokenizer, "bos_token_id") else tokenizer


def in_bytes(text: str, places: np.ndarray) -> np.ndarray:
    """Convert positions in a text from characters to UTF-8 bytes."""
    if text.isascii():
        return places
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate([[0], widths.cumsum()])[places]


def _opened(path: str) -> Any:
    from huggingface_hub import constants
    from transformers import AutoTokenizer

    from .opening import hub_answers

    folder = Path(path).expanduser()
    options = {"trust_remote_code": False}  # if not given, it would prompt at the terminal
    try:
        return AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else path, local_files_only=True, **options)
    except ValueError as error:
        raise ValueError(
            f"the tokenizer at '{path}' cannot be built: a folder needs tokenizer.json, or sentencepiece or tiktoken installed, "
            f"and no code of its own, which is never run; set {setting('dataset.tokenizer')} to such a folder, or "
            f"{setting('dataset.tokenizer', None)} for bytes"
        ) from error
    except OSError as error:
        if folder.is_dir() or constants.HF_HUB_OFFLINE or not hub_answers():
            why = "the folder has none" if folder.is_dir() else "it is not on this machine and the hub cannot be reached"
            raise _not_here(path, why) from error
    try:
        return AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise _not_here(path, "the hub has none, or requires a login") from error


def _not_here(path: str, why: str) -> FileNotFoundError:
    key = either("tokenizer", "dataset.tokenizer (which is model.path, unless set)")
    return FileNotFoundError(
        f"no tokenizer at '{path}': {why}; {key} is a folder with tokenizer.json, a hub id, or {either('None', 'null')} for bytes"
    )


def _even_ends(tokens: int, characters: int) -> np.ndarray:
    """Ends of tokens without offsets, as if all had equal length: exact over a document, approximate within it."""
    return np.linspace(0, characters, tokens + 1)[1:].round()


def _bytes_of(text: str, ends: np.ndarray) -> np.ndarray:
    """Bytes of each token, given the ends: text between tokens counts for the next one, the tail for the last."""
    if not len(ends):
        return ends.astype(np.int32)
    ends = np.maximum.accumulate(in_bytes(text, ends))
    ends[-1] = len(text.encode())
    return np.diff(ends, prepend=0).astype(np.int32)
