"""Atomic writing of files: a file appears complete or not at all."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

_BEFOREHAND = {".hydra", "settings.json", "identity.json", ".log", "splits.json", "hparams.yaml"}
_RESULTS = {"units.parquet", "layers.parquet", "metadata.json", "report.html", "result.json", "checkpoints", "epochs", "cells"}
_RESULTS |= {"dense.json", "sweep.parquet", "ranking.parquet", "pruned"}
_INFINITIES = {"Infinity": math.inf, "-Infinity": -math.inf}


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Lets ``fill`` write a temporary file next to the path, waits until it is on the disk, then renames it atomically.

    Raises OSError, with the path, if it cannot be written; a former file at the path is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        fill(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())  # a rename may reach the disk before the content does
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, with NaN as null, and infinities, which JSON does not have, as the words that ``read_json`` knows."""
    text = json.dumps(_mapped(plain(value), _in_words), indent=1, allow_nan=False)
    write(path, lambda temporary: temporary.write_text(text + "\n"))


def read_json(path: Path) -> Any:
    """Reads a JSON file, with infinities as numbers. Raises ValueError for a file that is not JSON."""
    try:
        return _mapped(json.loads(path.read_text()), _in_numbers)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A value of dictionaries and lists with other leaves."""
    if isinstance(value, dict):
        return {k: _mapped(v, change) for k, v in value.items()}
    return [_mapped(v, change) for v in value] if isinstance(value, list) else change(value)


def _in_words(value: Any) -> Any:
    return next((word for word, infinity in _INFINITIES.items() if value == infinity), value) if isinstance(value, float) else value


def _in_numbers(value: Any) -> Any:
    return _INFINITIES.get(value, value) if isinstance(value, str) else value


def holds_results(folder: Path) -> bool:
    """Whether a run folder has results of a run, which later runs use again. Files that a run does not write do not count."""
    of_analyses = (path.parent for path in folder.glob("*/metadata.json"))
    return any((folder / name).exists() for name in _RESULTS) or any(not (f / "settings.json").exists() for f in of_analyses)


def has_other_files(folder: Path) -> bool:
    """Whether a run folder has any files other than those written before the computation: settings, config, log, splits."""
    return any(p.is_file() and not (_BEFOREHAND & {p.name, p.parent.name, p.suffix}) for p in folder.rglob("*"))


def remove_traces(folder: Path, there: Path) -> None:
    """Removes the folder of a run that ended without results, and its empty parents up to ``there``."""
    if there not in folder.parents or has_other_files(folder):
        return
    shutil.rmtree(folder, ignore_errors=True)
    while folder.parent != there and not any(folder.parent.iterdir()):
        folder = folder.parent
        folder.rmdir()


def plain(value: Any) -> Any:
    """Converts a value to dictionaries, lists, numbers and strings, which a weights-only load accepts; NaN becomes None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return plain(value.item()) if hasattr(value, "item") else str(value)
