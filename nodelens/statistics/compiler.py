"""Loops in C, which the C compiler of this machine compiles once.

Where torch comes with the OpenMP of the compiler (libgomp, as its wheels for Linux do), the threads of a library are those of
torch; a compiler without OpenMP makes loops of one thread. Libraries are kept in the user's cache folder, under a name that tells
the source, the compiler's options and the processor apart.
"""

import atexit
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

_OPTIONS = ("-march=native -fopenmp", "-fopenmp", "-march=native", "")  # the first that the compiler takes
_MINUTES = 2.0
_PART = "part-"  # folders in which a library is made
seconds: dict[tuple[Path, str], float] = {}  # that compiling took, by the source and the type of its numbers


@cache
def load(source: Path, number: str) -> Any:
    """The library that a source makes with NUMBER as float or double. Raises OSError, with what the compiler said, without one."""
    start = time.perf_counter()
    found: Any = None
    problems: list[str] = []
    for options in _OPTIONS:
        command = [*shlex.split(os.environ.get("CC") or "cc"), "-O3", "-shared", "-fPIC", *options.split()]
        try:
            file = _compiled([*command, f"-DNUMBER={number}"], source)
        except OSError as error:
            problems.append(str(error))
            continue
        try:
            found = ctypes.CDLL(str(file))
            break
        except OSError as error:  # a damaged file, which is made again by the next process
            file.unlink(missing_ok=True)
            problems.append(str(error))
    if found is None:
        raise OSError(f"{source.name} cannot be compiled: {problems[0]}")
    seconds[source, number] = seconds.get((source, number), 0.0) + time.perf_counter() - start
    return found


def _compiled(command: list[str], source: Path) -> Path:
    """The library that a command makes, from the cache if it was made before. Raises OSError if the compiler fails."""
    key = hashlib.sha256("\n".join([*command, _processor(), source.read_text(encoding="utf-8")]).encode()).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nodelens"
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
        made = tempfile.mkdtemp(prefix=_PART, dir=folder)
    except (OSError, RuntimeError):  # no home, or one that cannot be written to
        folder = Path(made := tempfile.mkdtemp(prefix="nodelens-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file, part = folder / f"{source.stem}-{key}.so", Path(made, "part.so")
    try:
        if not file.exists():
            done = subprocess.run(
                [*command, "-o", str(part), str(source)],
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=60 * _MINUTES,
            )
            if done.returncode:
                raise OSError(done.stderr.strip()[-500:] or f"{command[0]} ended with status {done.returncode}")
            part.replace(file)
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} took more than {_MINUTES:g} minutes") from None
    finally:
        if folder != Path(made):
            shutil.rmtree(made, ignore_errors=True)
    return file


def _remove_unfinished(folder: Path) -> None:
    """Removes what compilers that were killed have left."""
    for left in folder.glob(f"{_PART}*"):
        with suppress(OSError):  # another process was faster
            if time.time() - left.stat().st_mtime > 10 * 60 * _MINUTES:
                shutil.rmtree(left, ignore_errors=True)


def _processor() -> str:
    """What tells processors apart whose libraries must not be mixed, such as those of two nodes with one home."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(dict.fromkeys(line for line in lines if line.partition(":")[0].strip() in ("model name", "flags", "Features")))
