"""Atomic writing of files: a file appears complete or not at all."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MANIFEST = "SHA256SUMS"
_DATA = {".parquet", ".csv", ".json", ".safetensors", ".ckpt", ".pt", ".npz"}
SUMS = "sums"  # folder of the sums of an unfinished pass, in a run folder
_HOST = re.sub(r"[^\w-]", "_", socket.gethostname())
_PART = re.compile(r"\..+\.(?P<pid>\d+)(@(?P<host>[\w-]+))?\.part")
_FAILED = ("os error", "iostream error", "inline_container", "PytorchStreamWriter")  # what safetensors and torch say instead
_BEFOREHAND = {MANIFEST, ".lock", ".lock.json", ".hydra", "settings.json", "identity.json", ".log", "splits.json", "hparams.yaml"}
_RESULTS = {"units.parquet", "layers.parquet", "metadata.json", "report.html", "result.json", "checkpoints", "epochs", "cells"}
_RESULTS |= {"history.csv", "dense.json", "sweep.parquet", "ranking.parquet", "pruned", SUMS}
_INFINITIES = {"Infinity": math.inf, "-Infinity": -math.inf}


def write(path: Path, fill: Callable[[Path], object], listed: bool = True) -> None:
    """Lets ``fill`` write a temporary file next to the path, adds its SHA-256 to the folder's manifest, and renames it atomically.

    listed: whether a file with data is added to the manifest; pictures and pages never are.

    Raises OSError with the name of the path if it cannot be written, for example because the disk is full; what was there before is
    left as it is.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}@{_HOST}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fill(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())  # a rename may reach the disk before the content does
        if listed and path.suffix in _DATA:
            _record(path, temporary)
        temporary.replace(path)
    except Exception as error:
        if not isinstance(error, OSError) and not any(words in str(error) for words in _FAILED):
            raise
        number = getattr(error, "errno", None)
        words = next(iter(str(error).splitlines()), "") + ("" if isinstance(error, OSError) else " (is the disk full?)")
        reason = os.strerror(number) if number else words
        raise OSError(number or errno.EIO, reason, str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def checked(path: Path) -> Path:
    """The path of a file, once it is known to be the one that was written.

    ``SHA256SUMS`` in the same folder lists the SHA-256 of each file in the format of sha256sum. A file that is not listed there, as
    in a folder of an earlier version, is not checked. Raises ValueError for a file that differs.
    """
    known, manifest = _listed(path), path.parent / MANIFEST
    if known and _sha256(path) not in known:
        raise ValueError(
            f"{path} is damaged: its SHA-256 is not the one that {manifest} lists: restore the file from a copy, or delete it, so "
            f"that the run computes it again; if the change was meant, delete its lines in {MANIFEST}"
        )
    return path


def is_there(path: Path) -> bool:
    """Whether a file that need not be written is there. Raises FileNotFoundError if it was written and is missing."""
    if not path.is_file() and _listed(path):
        raise FileNotFoundError(
            f"{path} is missing, and {MANIFEST} lists it: restore it from a copy, or delete its lines in {MANIFEST}"
        )
    return path.is_file()


def _listed(path: Path) -> list[str]:
    """The hashes of a file in the manifest beside it: several where it was written several times, none where it is not listed."""
    manifest = path.parent / MANIFEST
    if not manifest.is_file():
        return []
    lines = (line.split("  ", 1) for line in manifest.read_text(encoding="utf-8", errors="replace").splitlines())
    return [line[0] for line in lines if line[1:] == [path.name]]


def remove(path: Path) -> None:
    """Removes a file that another result replaces, and its lines in the manifest."""
    manifest = path.parent / MANIFEST
    if _listed(path):
        lines = manifest.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if line.split("  ", 1)[1:] != [path.name]]
        temporary = manifest.with_name(f".{MANIFEST}.{os.getpid()}@{_HOST}.part")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        temporary.replace(manifest)
    path.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Leaves one line in the manifests of a finished run for each file that is there: old lines are of contents that are gone.

    A file that differs from all its lines keeps them, so that it is still refused.
    """
    for manifest in folder.rglob(MANIFEST):
        names = dict.fromkeys(line.split("  ", 1)[-1] for line in manifest.read_text(encoding="utf-8").splitlines())
        lines = []
        for path in (manifest.parent / name for name in names):
            known = _listed(path) if path.is_file() else []
            kept = known if len(known) < 2 or (now := _sha256(path)) not in known else [now]
            lines += [f"{each}  {path.name}\n" for each in kept]
        if "".join(lines) != manifest.read_text(encoding="utf-8"):
            temporary = manifest.with_name(f".{MANIFEST}.{os.getpid()}@{_HOST}.part")
            temporary.write_text("".join(lines), encoding="utf-8")
            temporary.replace(manifest)


@contextmanager
def reading(path: Path) -> Iterator[Path]:
    """Checks a file before a block reads it. Raises ValueError with its name, also where the block fails to read it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: restore it from a copy, or choose another folder")
    checked(path)
    try:
        yield path
    except Exception as error:  # readers raise errors of many classes for damaged files, and few of them name the file
        first = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {first}): restore it from a copy, or delete it"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8."""
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, with NaN as null, and infinities, which JSON does not have, as the words that ``read_json`` knows."""
    write_text(path, json.dumps(_mapped(plain(value), _in_words), indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file, with infinities as numbers. Raises ValueError for a file that is not JSON."""
    try:
        return _mapped(json.loads(path.read_text(encoding="utf-8")), _in_numbers)
    except (ValueError, RecursionError) as error:  # other bytes than text, numbers of too many digits, lists nested too deeply
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


def sweep_parts(folder: Path) -> None:
    """Removes temporary files of ``write`` that a dead process left in a folder: one of this host, or untouched for an hour."""
    for path in folder.rglob(".*.part"):
        if match := _PART.fullmatch(path.name):
            here, old = match["host"] in (None, _HOST), time.time() - path.stat().st_mtime > 3600
            if not _alive(int(match["pid"])) if here else old:
                path.unlink(missing_ok=True)


def _record(path: Path, written: Path) -> None:
    """Appends the hash of a file that will be renamed to the path: before and after that, the file at the path is a listed one."""
    manifest = path.parent / MANIFEST
    whole = not manifest.exists() or manifest.read_bytes()[-1:] in (b"", b"\n")  # no line was cut off by a kill
    with manifest.open("ab") as lines:
        lines.write(f"{'' if whole else chr(10)}{_sha256(written)}  {path.name}\n".encode())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _alive(pid: int) -> bool:
    """Whether a process of this host runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


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


def remove_sums(folder: Path) -> None:
    """Removes the sums of a pass from a run folder, when its result is saved."""
    shutil.rmtree(folder / SUMS, ignore_errors=True)


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


def is_name(name: object) -> bool:
    """Whether something names a file or folder directly inside of another one: a text that is no path, nor ``..``."""
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name and "\0" not in name
