"""Compilation of loops by numba, and where the machine code is kept."""

import importlib.util
import os
from collections.abc import Callable
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
