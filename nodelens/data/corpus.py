"""Sources of documents: the embedded corpus, text files, JSON lines, and everything that `datasets` opens."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nodelens.messages import setting

from .cache import file_hash

_CHUNK = 1 << 20  # characters read at once
_KINDS = "a text file, a folder of .txt files, .jsonl or .parquet with a text column, or a hub id"


@dataclass(frozen=True)
class Corpus:
    r"""A sequence of documents.

    path:        a text file (UTF-8), a folder of .txt files (one or more documents each), a .jsonl or .parquet file, a folder
                 from save_to_disk or with parquet, a hub id; None: Python's language reference, included in every Python
    name:        the configuration of a hub id
    key:         the column with the text
    separator:   the string that separates documents in plain text; white space around documents is removed; "\n" is a line
                 end (so "\n\n" means empty lines). None: each file is one document, unchanged
    train_split: the training split; test_split: the test split; None: "test" if there is one
    streaming:   read a hub id in order without storing it. Plain text with a separator is always read in chunks
    """

    path: str | None = None
    name: str | None = None
    key: str = "text"
    separator: str | None = None
    train_split: str = "train"
    test_split: str | None = None
    streaming: bool = False

    def open(self) -> list[Iterator[str]]:
        """The documents; those of the test set, if there is one, as a second iterator.

        Raises: FileNotFoundError if nothing is found; ValueError for unsuitable text, splits or columns. Errors in a line or
        row are raised when it is read.
        """
        if self.path is None:
            return [_embedded()]
        place = Path(self.path).expanduser()
        if place.is_file() and place.suffix == ".jsonl":
            return [self._lines(place)]
        if place.is_file() and place.suffix != ".parquet":
            return [self._files([place])]
        if place.is_dir() and (files := sorted(place.rglob("*.txt"))):
            return [self._files(files)]
        if not place.exists() and (place.suffix in (".txt", ".jsonl", ".parquet") or place.is_absolute()):
            raise FileNotFoundError(f"no text at {place.resolve()}; {setting('dataset.path')} is {_KINDS}")
        return self._tables()

    def fingerprint(self) -> str:
        """A hash of the text, which is read entirely, and of the options. Raises the errors of ``open``."""
        place = Path(self.path or "").expanduser()
        if self.path is None:
            found = hashlib.blake2b("\0".join(_embedded()).encode(), digest_size=16).hexdigest()
        elif place.exists():
            found = file_hash([place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file()))
        else:
            from .opening import stored_files

            self.open()
            found = file_hash(stored_files(self.path, self.name))
        return hashlib.blake2b(f"{found} {astuple(self)[1:]} {self.path is None}".encode(), digest_size=16).hexdigest()

    def _files(self, files: list[Path]) -> Iterator[str]:
        for file in files:
            try:
                if self.separator is None:
                    yield file.read_text(encoding="utf-8")
                else:
                    yield from _between(file, self.separator.replace("\\n", "\n"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} is not UTF-8 text (byte {error.start}); {setting('dataset.path')} is {_KINDS}") from error

    def _lines(self, file: Path) -> Iterator[str]:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield self._text(_object(line, f"{file}, line {number}"), f"{file}, line {number}")

    def _tables(self) -> list[Iterator[str]]:
        from .opening import open_sets  # importing `datasets` takes a second that plain text does not need

        assert self.path is not None
        try:
            sets = open_sets(self.path, self.name, self.streaming)
        except FileNotFoundError as error:
            what = str(error).partition(";")[0]
            raise FileNotFoundError(
                f"{what}; {setting('dataset.path')} is {_KINDS}; {setting('dataset.path', None)} is the embedded text"
            ) from error
        parts = [self._split(sets, self.train_split, "train")]
        if self.test_split is not None or "test" in sets:
            parts.append(self._split(sets, self.test_split or "test", "test"))
        return [self._rows(part) for part in parts]

    def _split(self, sets: dict[str, Any], name: str, role: str) -> Any:
        what = f"dataset '{self.path}'"
        if name not in sets:
            raise ValueError(f"{what} has no split '{name}', it has {', '.join(sets)}; set {setting(f'dataset.{role}_split')}")
        columns = sets[name].column_names
        if columns is not None and self.key not in columns:
            raise ValueError(f"{what} has no column '{self.key}', it has {', '.join(columns)}; set {setting('dataset.text_key')}")
        return sets[name]

    def _rows(self, rows: Any) -> Iterator[str]:
        for row in rows.select_columns([self.key]):
            yield self._text(row, f"dataset '{self.path}'")

    def _text(self, row: dict[str, Any], where: str) -> str:
        if self.key not in row:
            raise ValueError(f"{where} has no '{self.key}', it has {', '.join(row)}; set {setting('dataset.text_key')}")
        text = row[self.key]
        if not isinstance(text, str | None):
            raise ValueError(
                f"{where}: '{self.key}' is {type(text).__name__}, texts are strings; set {setting('dataset.text_key')}"
            )
        return text or ""


def _between(file: Path, separator: str) -> Iterator[str]:
    """The stripped text between separators; holds one chunk of the file at a time."""
    rest = ""
    with file.open(encoding="utf-8") as text:
        for chunk in iter(partial(text.read, _CHUNK), ""):
            *parts, rest = (rest + chunk).split(separator)
            yield from (part.strip() for part in parts)
    yield rest.strip()


def _embedded() -> Iterator[str]:
    from pydoc_data.topics import topics  # the text differs between Python versions

    return iter(topics[name] for name in sorted(topics))


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where} is a {type(found).__name__}; each line must be an object with a text")
    return found
