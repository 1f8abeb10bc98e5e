"""The command line inside the test's own process: a script's start costs seconds."""

import contextlib
import copy
import io
import logging
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra.types import RunMode

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
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _composed_once():
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


@contextlib.contextmanager
def _composed_once():
    """A command composes its config for the checks, for Hydra's mode and for the run, each half of what a small run takes."""
    with (
        mock.patch.object(Hydra, "get_mode", return_value=None),
        mock.patch.object(ConfigLoaderImpl, "load_configuration", _sharing(ConfigLoaderImpl.load_configuration)),
        mock.patch.object(yaml, "load", _parsed_once),
    ):
        yield


def _sharing(compose):
    made, mode = {}, "hydra.mode=RUN"  # which Hydra appends to the words of the run

    def load_configuration(self, config_name, overrides, run_mode, **more):
        words = [word for word in overrides if word != mode]
        places = [(each.provider, each.path) for each in self.get_search_path().get_path()]
        key = (config_name, *words, run_mode, *places)
        if key not in made:
            made[key] = compose(self, config_name=config_name, overrides=words, run_mode=run_mode, **more)
        cfg = copy.deepcopy(made[key])
        if words != overrides:
            cfg.hydra.mode = RunMode.RUN
            cfg.hydra.overrides.hydra.append(mode)
        return cfg

    return load_configuration


_load, _parsed = yaml.load, {}


def _parsed_once(stream, Loader):
    """YAML of the same text is parsed once."""
    text = stream if isinstance(stream, str) else stream.read()
    key = (text, Loader.__qualname__)
    if key not in _parsed:
        if stream is not text:
            stream.seek(0)  # its name is part of an error
        _parsed[key] = _load(stream, Loader)
    return copy.deepcopy(_parsed[key])


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time and bytes of every file below a folder."""
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}
