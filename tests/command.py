"""The command line inside the test's own process: a script's start costs seconds."""

import contextlib
import io
import logging
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from hydra._internal.hydra import Hydra

from nodelens.app import cli


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def command(task: str, *words: str) -> Ended:
    """What ``python <task>.py <words>`` does."""
    before, out, err = list(logging.getLogger().handlers), io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, [f"{task}.py", *words]
    assert not any(word.startswith("hydra.mode") for word in words)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _no_composition_for_the_mode():
            cli.main(task)
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            err.write(end.code + "\n")
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.argv = argv
        for handler in [h for h in logging.getLogger().handlers if h not in before]:
            logging.getLogger().removeHandler(handler)
            handler.close()
    return Ended(code, out.getvalue(), err.getvalue())


def _no_composition_for_the_mode():
    """Hydra composes the config once only to find that it sets no hydra.mode, a fifth of what a small run takes."""
    return mock.patch.object(Hydra, "get_mode", return_value=None)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time and bytes of every file below a folder."""
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}
