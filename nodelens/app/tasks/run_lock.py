"""The lock of a run folder: one run at a time writes to it."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")  # where the processes of one run are started by torchrun, srun or Lightning


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder. Raises ValueError, with the host and process that run there, if one is at work.

    The system releases the lock when its process ends, however that happens. The first process of a run holds it for the others.
    A file system that has no locks leaves the folder open.
    """
    lock = _acquired(folder) if _is_first() else None
    try:
        yield
    finally:
        if lock is not None:
            (folder / ".lock.json").unlink(missing_ok=True)
            lock.release()


def check_free(folder: Path) -> None:
    """Raises ValueError if a run is at work in a folder. Writes nothing."""
    if (folder / ".lock").is_file() and _is_first() and (lock := _try(folder)) is not None:
        lock.release()


def _acquired(folder: Path) -> FileLock | None:
    folder.mkdir(parents=True, exist_ok=True)
    lock = _try(folder)
    if lock is not None:
        about = {"host": socket.gethostname(), "pid": os.getpid(), "since": f"{datetime.now():%Y-%m-%d %H:%M}"}
        (folder / ".lock.json").write_text(json.dumps(about), encoding="utf-8")
    return lock


def _try(folder: Path) -> FileLock | None:
    """The lock, or None where the file system has none."""
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{folder} is in use by {_holder(folder)}: wait until that run ends, stop it, or choose another folder (hydra.run.dir=)"
        ) from None
    except NotImplementedError:
        return None
    return lock


def _holder(folder: Path) -> str:
    try:
        about = json.loads((folder / ".lock.json").read_text(encoding="utf-8"))
        return f"process {about['pid']} on {about['host']}, since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is being written
        return "another process"


def _is_first() -> bool:
    """Whether this is the first process of a run."""
    return next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0"
