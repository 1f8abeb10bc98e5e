"""Where documents come from: the embedded corpus, text files, JSON lines, and what `datasets` opens."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .cache import file_hash

_STRETCH = 1 << 20  # characters
_KINDS = "a text file, a folder of .txt files, .jsonl or .parquet with a text column, or a hub id"


@dataclass(frozen=True)
class Corpus:
    r"""Documents to be read in order.

    path:        a text file (UTF-8), a folder of .txt files (one or more documents each), a .jsonl or .parquet file, a folder
                 from save_to_disk or with parquet, a hub id; None: Python's own language reference, which every Python has
    name:        the configuration of a hub id
    key:         the column with the text
    separator:   a string at which plain text is cut into documents, without the white space around them; "\n" is a line's end
                 (so "\n\n" means empty lines). None: a file is one document, as it is
    train_split: the split to train on; test_split: the test set; None: "test" where there is one
    streaming:   read a hub id in order, and store nothing. Plain text is read a stretch at a time where a separator cuts it
    """

    path: str | None = None
    name: str | None = None
    key: str = "text"
    separator: str | None = None
    train_split: str = "train"
    test_split: str | None = None
    streaming: bool = False

    def open(self) -> list[Iterator[str]]:
        """The documents; those of the test set as a second part, where there is one.

        Raises: FileNotFoundError when there is nothing to read; ValueError for text, splits or columns that do not fit. Those of
        a line or a row come while it is read.
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
            raise FileNotFoundError(f"no text at {place.resolve()}; dataset.path is {_KINDS}")
        return self._tables()

    def fingerprint(self) -> str:
        """A hash of the text, and of how it is read; all of it is read for this. Raises as ``open`` does."""
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
                raise ValueError(f"{file} is no UTF-8 text (byte {error.start}); dataset.path is {_KINDS}") from error

    def _lines(self, file: Path) -> Iterator[str]:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield self._text(_object(line, f"{file}, line {number}"), f"{file}, line {number}")

    def _tables(self) -> list[Iterator[str]]:
        from .opening import open_sets  # `datasets` costs a second that plain text does not need

        assert self.path is not None
        try:
            sets = open_sets(self.path, self.name, self.streaming)
        except FileNotFoundError as error:
            what = str(error).partition(";")[0]
            raise FileNotFoundError(f"{what}; dataset.path is {_KINDS}, or null for the embedded text") from error
        parts = [self._split(sets, self.train_split, "train")]
        if self.test_split is not None or "test" in sets:
            parts.append(self._split(sets, self.test_split or "test", "test"))
        return [self._rows(part) for part in parts]

    def _split(self, sets: dict[str, Any], name: str, role: str) -> Any:
        what = f"dataset '{self.path}'"
        if name not in sets:
            raise ValueError(f"{what} has no split '{name}', it has {', '.join(sets)}; set dataset.{role}_split")
        columns = sets[name].column_names
        if columns is not None and self.key not in columns:
            raise ValueError(f"{what} has no column '{self.key}', it has {', '.join(columns)}; set dataset.text_key")
        return sets[name]

    def _rows(self, rows: Any) -> Iterator[str]:
        for row in rows.select_columns([self.key]):
            yield self._text(row, f"dataset '{self.path}'")

    def _text(self, row: dict[str, Any], where: str) -> str:
        if self.key not in row:
            raise ValueError(f"{where} has no '{self.key}', it has {', '.join(row)}; set dataset.text_key")
        text = row[self.key]
        if not isinstance(text, str | None):
            raise ValueError(f"{where}: '{self.key}' is {type(text).__name__}, texts are strings; set dataset.text_key")
        return text or ""


def _between(file: Path, separator: str) -> Iterator[str]:
    """What lies between separators, without the white space around it; a stretch of the file is held at a time."""
    rest = ""
    with file.open(encoding="utf-8") as text:
        for stretch in iter(partial(text.read, _STRETCH), ""):
            *parts, rest = (rest + stretch).split(separator)
            yield from (part.strip() for part in parts)
    yield rest.strip()


def _embedded() -> Iterator[str]:
    from pydoc_data.topics import topics  # its text differs between versions of Python

    return iter(topics[name] for name in sorted(topics))


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where} is a {type(found).__name__}; a line is an object with a text")
    return found
