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


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Lets ``fill`` write a temporary file next to the path, then renames it atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        fill(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, with NaN and infinities as null."""
    text = json.dumps(plain(value), indent=1, allow_nan=False)
    write(path, lambda temporary: temporary.write_text(text + "\n"))


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises ValueError for a file that is not JSON."""
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # other bytes than text, numbers of too many digits, lists nested too deeply
        raise ValueError(f"{path} is not valid JSON: {error}") from None


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
    """Converts a value to dictionaries, lists, numbers and strings, which JSON and a weights-only load accept."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return plain(value.item()) if hasattr(value, "item") else str(value)
