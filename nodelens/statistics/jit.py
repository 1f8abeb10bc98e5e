"""Compilation of loops by numba: where the machine code is kept, and whether it is there already."""

import hashlib
import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

INSTALLED = importlib.util.find_spec("numba") is not None


def folder() -> Path:
    """Where machine code is kept: ``NUMBA_CACHE_DIR``, or nodelens/kernels in the user's cache folder."""
    given = os.environ.get("NUMBA_CACHE_DIR")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nodelens" / "kernels"


def compiled(function: Callable[..., Any]) -> Any:
    """A function that numba compiles at its first call, or reads from the folder.

    Sums may be formed in any order, so that several values are added at once; NaN and infinities are kept. numba writes each file
    under another name first, so that a process which is killed leaves no broken one.
    """
    import numba

    config: Any = numba.config
    options: Any = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz", "arcp"}}
    before = config.CACHE_DIR
    try:
        folder().mkdir(parents=True, exist_ok=True)
        config.CACHE_DIR = str(folder())
        return numba.njit(cache=True, **options)(function)
    except (OSError, RuntimeError):  # the folder cannot be written: compiled again in each process
        return numba.njit(**options)(function)
    finally:
        config.CACHE_DIR = before


@cache  # so that passes of one process use one back end
def is_compiled(name: str) -> bool:
    """Whether an earlier process called ``set_compiled`` with this name, for the same versions of the loops and of numba."""
    return _mark(name).is_file()


def set_compiled(name: str) -> None:
    """Notes that the machine code of all loops is in the folder; does nothing where it cannot be written."""
    with suppress(OSError):
        _mark(name).touch()


def _mark(name: str) -> Path:
    source = Path(__file__).with_name("compiled.py").stat()
    about = f"{version('numba')} {platform.machine()} {sys.version_info[:2]} {source.st_mtime_ns} {source.st_size} {__file__}"
    return folder() / f"{name}-{hashlib.sha256(about.encode()).hexdigest()[:16]}"
