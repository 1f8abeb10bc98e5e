"""The results of many runs as one table."""

import fnmatch
import warnings
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from nodelens.messages import kind_of

from .files import reading
from .result import Result, flatten, load

Rows = Literal["units", "layers", "edges", "sweep"]
_MAGIC = set("*?[")


def load_runs(pattern: str, rows: Rows = "units") -> pd.DataFrame:
    """Loads the finished runs in folders that match a pattern, such as ``outputs/**``, as one frame.

    rows: one row per unit, layer, or pair of layers of each run, or per cell of the sweeps of ``prune.py``. Beside the values there
    are the columns ``run`` (its folder), the scores of the evaluation (``accuracy``, ``loss``, ...), and the values of the
    configuration that are not the same in all runs. Those that are the same are in ``frame.attrs["constant"]``. A configuration
    value or score with the name of another column has the prefix ``config.`` or ``evaluation.``.

    ``epochs/`` of a training and the folders of analyses are no runs; a run that several links lead to is loaded once. A run
    that cannot be read is left out, with a warning that says why. Raises FileNotFoundError if no run matches, and ValueError for
    another kind of rows.
    """
    if not isinstance(pattern, (str, PathLike)):
        raise TypeError(f"nl.load_runs takes a pattern of folders, such as 'outputs/**', not {kind_of(pattern)}")
    if rows not in ("units", "layers", "edges", "sweep"):
        raise ValueError(f"rows is {rows!r}; it is units, layers, edges or sweep")
    folders = _runs(pattern)
    read = {folder: found for folder in folders if (found := _read(folder, rows)) is not None}
    if not read:
        raise FileNotFoundError(f"no finished run matches {pattern!r}" if not folders else f"no run of {pattern!r} can be read")
    taken = {"run", *(str(column) for table, _ in read.values() for column in table)}
    settings = {folder: _named(about, taken) for folder, (_, about) in read.items()}
    names = list(dict.fromkeys(name for each in settings.values() for name in each))
    values = {name: [each.get(name) for each in settings.values()] for name in names}
    varied = {name for name, every in values.items() if len(set(map(repr, every))) > 1}
    frames = [
        table.assign(run=str(folder), **{name: value for name, value in settings[folder].items() if name in varied})
        for folder, (table, _) in read.items()
    ]
    frame = pd.concat(frames, ignore_index=True)
    frame.attrs["constant"] = {name: every[0] for name, every in values.items() if name not in varied}
    return frame


def _named(about: dict[tuple[str, str], Any], taken: set[str]) -> dict[str, Any]:
    """Settings and scores by column, with a prefix where the table, or a setting, has the name already."""
    found: dict[str, Any] = {}
    for (kind, name), value in about.items():
        found[f"{kind}.{name}" if name in taken or name in found else name] = value
    return found


def _read(folder: Path, rows: Rows) -> tuple[pd.DataFrame, dict[tuple[str, str], Any]] | None:
    """The rows of a run, and its configuration and scores; None, with a warning, for a run that cannot be read."""
    try:
        result = load(folder)
        table = _table(folder, result, rows)
    except (OSError, ValueError) as error:
        warnings.warn(f"{folder} is left out: {error}", stacklevel=3)
        return None
    about = {("config", k): v for k, v in flatten(result.metadata.get("config") or {}).items()}
    about |= {("evaluation", k): v for k, v in (result.metadata.get("evaluation") or {}).items() if k != "split"}
    return table, about


def _table(folder: Path, result: Result, rows: Rows) -> pd.DataFrame:
    if rows != "sweep":
        return getattr(result, rows).reset_index()
    with reading(folder / "sweep.parquet") as path:
        return pd.read_parquet(path)


def _runs(pattern: str) -> list[Path]:
    """The folders of finished runs that match, each once, sorted."""
    base, parts = Path(pattern).anchor, Path(pattern).parts
    start, parts = (Path(base), parts[1:]) if base else (Path(), parts)
    found: dict[Path, Path] = {}
    for folder in _matching(start, list(parts), set()):
        if (folder / "metadata.json").is_file() and (folder / "units.parquet").is_file() and folder.name != "epochs":
            real, known = folder.resolve(), found.get(folder.resolve())
            if known is None or (len(folder.parts), folder) < (len(known.parts), known):
                found[real] = folder
    return sorted(folder for real, folder in found.items() if real.parent not in found)  # subfolders are analyses of a run


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
