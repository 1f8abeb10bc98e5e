"""The results of many runs as one table."""

import fnmatch
import re
import warnings
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd

from nodelens.messages import kind_of, listed

from .files import reading
from .result import flatten, read_metadata, read_table

KINDS = ("units", "layers", "edges", "sweep")
_OF_ANALYSIS = re.compile(r"\w+\.\w+")
_MAGIC = set("*?[")


def load_runs(pattern: str | Path | Sequence[str | Path], rows: str = "units") -> pd.DataFrame:
    """Loads the finished runs in folders that match a pattern, such as ``outputs/**``, or one of several, as one frame.

    Of a folder that is no run, such as that of a multirun, all runs in it are loaded.

    rows: ``units``, ``layers``, ``edges`` (pairs of layers), ``sweep`` (the cells of ``prune.py``), or a table of an analysis, such
    as ``modularity.modules``. Each run has its rows of that table in the frame. Beside the values there are the columns ``run``
    (its folder), the scores of the evaluation (``accuracy``, ``loss``, ...), and the values of the configuration that are not the
    same in all runs, with the prefix ``trained_by.`` those of the training that made the weights. Those that are the same are in
    ``frame.attrs["constant"]``; ``frame.attrs["settings"]`` and ``["scores"]`` list the columns that are configuration and scores.
    A configuration value or score with the name of another column has the prefix ``config.`` or ``evaluation.``.

    ``epochs/`` of a training and the folders of analyses are no runs; a run that several links lead to is loaded once. A run
    that cannot be read is left out, with a warning that says why. Raises FileNotFoundError if no run matches, and ValueError for
    another kind of rows or an empty list.
    """
    every = [pattern] if isinstance(pattern, (str, PathLike)) else pattern
    if not isinstance(every, Sequence) or not all(isinstance(each, (str, PathLike)) for each in every):
        raise TypeError(f"nl.load_runs takes a pattern of folders, such as 'outputs/**', or a list of them, not {kind_of(pattern)}")
    if not every:
        raise ValueError("the list of patterns of runs is empty: give folders of runs, such as ['outputs/**']")
    if rows not in KINDS and not _OF_ANALYSIS.fullmatch(rows):
        raise ValueError(f"rows is {rows!r}; it is {', '.join(KINDS)}, or a table of an analysis as in modularity.modules")
    folders = find_runs(pattern)
    read = {folder: found for folder in folders if (found := _read(folder, rows)) is not None}
    if not read:
        raise FileNotFoundError(
            f"no finished run matches {_listed(pattern)}: give the folder of a finished task, or a pattern such as 'outputs/**'"
            if not folders
            else f"no run of {_listed(pattern)} can be read: the warnings say why"
        )
    taken = {"run", *(str(column) for table, _ in read.values() for column in table)}
    named = {folder: _named(about, taken) for folder, (_, about) in read.items()}
    kinds = {name: kind for each in named.values() for name, (kind, _) in each.items()}
    values = {name: [each.get(name, ("", None))[1] for each in named.values()] for name in kinds}
    varied = {name for name, every in values.items() if len(set(map(repr, every))) > 1}
    frames = [
        table.assign(run=str(folder), **{name: value for name, (_, value) in named[folder].items() if name in varied})
        for folder, (table, _) in read.items()
    ]
    frame = pd.concat(frames, ignore_index=True)
    frame.attrs["constant"] = {name: every[0] for name, every in values.items() if name not in varied}
    frame.attrs["scores"] = [name for name, kind in kinds.items() if kind == "evaluation" and name in varied]
    frame.attrs["settings"] = [name for name, kind in kinds.items() if kind != "evaluation" and name in varied]
    return frame


def _named(about: dict[tuple[str, str], Any], taken: set[str]) -> dict[str, tuple[str, Any]]:
    """{column: (kind, value)} of settings and scores, with a prefix where the table, or a setting, has the name already."""
    found: dict[str, tuple[str, Any]] = {}
    for (kind, name), value in about.items():
        found[f"{kind}.{name}" if name in taken or name in found else name] = kind, value
    return found


def _read(folder: Path, rows: str) -> tuple[pd.DataFrame, dict[tuple[str, str], Any]] | None:
    """The rows of a run, and its configuration and scores; None, with a warning, for a run that cannot be read."""
    try:
        metadata = read_metadata(folder)
        table = _table(folder, metadata, rows)
    except (OSError, ValueError) as error:
        warnings.warn(f"{folder} is left out: {error}", stacklevel=3)
        return None
    about = {("config", k): v for k, v in flatten(metadata.get("config") or {}).items()}
    trained_by = (metadata.get("weights") or {}).get("trained_by") or {}
    about |= {("trained_by", f"trained_by.{k}"): v for k, v in flatten(trained_by).items() if not k.startswith("paths.")}
    about |= {("evaluation", k): v for k, v in (metadata.get("evaluation") or {}).items() if k != "split"}
    return table, about


def _table(folder: Path, metadata: dict[str, Any], rows: str) -> pd.DataFrame:
    if rows in ("units", "layers", "edges"):
        return read_table(folder, rows, metadata).reset_index()
    analysis, _, table = rows.rpartition(".")
    with reading(folder / analysis / f"{table}.parquet") as path:
        return pd.read_parquet(path)


def find_runs(pattern: str | Path | Sequence[str | Path]) -> list[Path]:
    """The folders of finished runs that match a pattern, or one of several, each once; of a folder of runs all in it.

    They are sorted, with numbers in the order of numbers.
    """
    found: dict[Path, Path] = {}
    for one in [pattern] if isinstance(pattern, (str, Path)) else pattern:
        base, parts = Path(one).anchor, Path(one).parts
        start, parts = (Path(base), parts[1:]) if base else (Path(), parts)
        matching = [folder for folder in _matching(start, list(parts), set()) if _is_run(folder)]
        if not matching and Path(one).is_dir():  # a folder of runs, such as that of a multirun
            matching = [folder for folder in _matching(start, [*parts, "**"], set()) if _is_run(folder)]
        for folder in matching:
            real, known = folder.resolve(), found.get(folder.resolve())
            if known is None or (len(folder.parts), folder) < (len(known.parts), known):
                found[real] = folder
    own = [folder for real, folder in found.items() if real.parent not in found]  # subfolders are analyses of a run
    return sorted(
        own, key=lambda folder: [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in folder.parts]
    )


def _is_run(folder: Path) -> bool:
    return (folder / "metadata.json").is_file() and (folder / "units.parquet").is_file() and folder.name != "epochs"


def _listed(pattern: str | Path | Sequence[str | Path]) -> str:
    every = [pattern] if isinstance(pattern, (str, Path)) else list(pattern)
    return listed([repr(str(one)) for one in every], 3)


def _matching(folder: Path, parts: list[str], seen: set[tuple[Path, int]]) -> Iterator[Path]:
    """The folders that match parts of a pattern, as glob does. ``**`` enters each folder once, however many links lead to it."""
    if not parts:
        yield folder
        return
    head, *rest = parts
    if head == "**":
        if (place := (folder.resolve(), len(parts))) in seen:
            return
        seen.add(place)
        yield from _matching(folder, rest, seen)
        for inner in _inside(folder, "*"):
            yield from _matching(inner, parts, seen)
    elif _MAGIC & set(head):
        for inner in _inside(folder, head):
            yield from _matching(inner, rest, seen)
    elif (folder / head).is_dir():
        yield from _matching(folder / head, rest, seen)


def _inside(folder: Path, pattern: str) -> list[Path]:
    """The folders inside one that match, without hidden ones; links come last."""
    try:
        inner = [path for path in folder.iterdir() if fnmatch.fnmatchcase(path.name, pattern) and path.is_dir()]
    except OSError:  # not readable, or gone
        return []
    return sorted((path for path in inner if not path.name.startswith(".")), key=lambda path: (path.is_symlink(), path.name))
