"""From text to tokens: bytes as they are, or the tokenizer of a model; each token knows how many bytes it stands for."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np


class Tokens(NamedTuple):
    """A document in tokens."""

    ids: np.ndarray  # (n,) int32
    nbytes: np.ndarray  # (n,) int32, of the document's UTF-8: together all of it


class Tokenizer(Protocol):
    """What the data need of a tokenizer; None where it has no such token."""

    @property
    def size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int | None: ...
    @property
    def pad(self) -> int: ...
    @property
    def special(self) -> tuple[int, ...]:
        """The ids of BOS, EOS and padding, of those that it has."""
        ...

    @property
    def exact(self) -> bool:
        """Whether the bytes of each token are its own, and not a share."""
        ...

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Each text's tokens, no special ones added."""
        ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def fingerprint(self) -> str:
        """A hash of all that decides which tokens a text becomes."""
        ...


@dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes are ids 0 to 255; then BOS, EOS and padding. It needs no file.

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
        """The text of ids, special ones left out; bytes that are no UTF-8 become U+FFFD."""
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

        Raises: FileNotFoundError, in one line, when it cannot be had; ValueError when it cannot be built.
        """
        return cls.around(_opened(path))

    @classmethod
    def around(cls, tokenizer: Any) -> "StoredTokenizer":
        """One that is open."""
        bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        special = tuple(dict.fromkeys(i for i in (bos, eos, pad) if i is not None))
        pad = next((i for i in (pad, eos) if i is not None), 0)  # whichever: it is masked
        return cls(tokenizer, max(tokenizer.get_vocab().values()) + 1, bos, eos, pad, special)

    @property
    def exact(self) -> bool:
        return bool(self.tokenizer.is_fast)

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        fast = self.tokenizer.is_fast  # the others do not say where a token ends
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
    """The byte-level tokenizer, or the one at a path. Raises as ``StoredTokenizer.of`` does."""
    return ByteTokenizer() if path is None else StoredTokenizer.of(path)


def as_tokenizer(tokenizer: Any) -> Tokenizer:
    """One of the data's, or one of transformers in their form."""
    return StoredTokenizer.around(tokenizer) if hasattr(tokenizer, "bos_token_id") else tokenizer


def in_bytes(text: str, places: np.ndarray) -> np.ndarray:
    """Places in a text, counted in characters, counted in bytes of its UTF-8."""
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
    options = {"trust_remote_code": False}  # asked for, it would wait for an answer at the terminal
    try:
        return AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else path, local_files_only=True, **options)
    except ValueError as error:
        raise ValueError(
            f"the tokenizer at '{path}' cannot be built: a folder needs tokenizer.json, or sentencepiece or tiktoken installed; "
            "set dataset.tokenizer to such a folder, or to null for bytes"
        ) from error
    except OSError as error:
        if folder.is_dir() or constants.HF_HUB_OFFLINE or not hub_answers():
            why = "the folder has none" if folder.is_dir() else "it is not on this machine and the hub cannot be reached"
            raise _not_here(path, why) from error
    try:
        return AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise _not_here(path, "the hub has none there, or wants a login") from error


def _not_here(path: str, why: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"no tokenizer at '{path}': {why}; dataset.tokenizer (which is model.path, unless set) is a folder with tokenizer.json, "
        "a hub id, or null for bytes"
    )


def _even_ends(tokens: int, characters: int) -> np.ndarray:
    """Ends of tokens that do not tell theirs, as if all were as long: right over a document, near inside it."""
    return np.linspace(0, characters, tokens + 1)[1:].round()


def _bytes_of(text: str, ends: np.ndarray) -> np.ndarray:
    """Bytes from the token before to the end of each: what lies between tokens goes to the next, the tail to the last."""
    if not len(ends):
        return ends.astype(np.int32)
    ends = np.maximum.accumulate(in_bytes(text, ends))
    ends[-1] = len(text.encode())
    return np.diff(ends, prepend=0).astype(np.int32)
