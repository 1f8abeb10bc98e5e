"""The command line: ``python -m nodelens.app analyze ...``, and what train.py, analyze.py and prune.py call."""

import errno
import io
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from nodelens.messages import config_words, nearest, version
from nodelens.results.files import remove_traces

from . import startup
from .config import TASKS, register, with_custom_model
from .explain import parsed_overrides
from .overrides import check_weights, configs, flags_of
from .renamed import taken_warnings, with_new_keys
from .run import run_task
from .search_path import CONF, MistakeError, config_folders

_ROLE = re.compile(r"^(layers|scope)=([A-Za-z_]\w*\[[^'\"]*)$")
_SELECT = re.compile(r"^(dataset\.select)=([^'\"].*)$")
_GROUP = re.compile(r"^\+(\w+)(?==)")
_USAGE = """usage: nodelens <task> [key=value ...]

tasks, each also a script of the repository (python train.py ...):
  train     trains a network; callbacks=measure also measures its units every epoch
  analyze   measures the units of a network in one pass over the data
  prune     removes units by their scores and evaluates what is left

nodelens <task> --help       the groups of settings, their options, and all keys
nodelens <task> --cfg job    the settings that a command line gives, without running it
nodelens <task> --quiet      warnings and errors only; <task>.log in the run folder has all lines
nodelens --version           the version

nodelens analyze model=resnet18 dataset=cifar10 ckpt_path=best.ckpt 'metrics=[rq,synergy]'"""
_TASK = "NODELENS_TASK"
_failed: list[str] = []  # a line for each failed job of a multirun
_there: list[Path] = []  # the nearest folder above the run's that existed before it


def train() -> None:
    """Entry of train.py."""
    main("train")


def analyze() -> None:
    """Entry of analyze.py."""
    main("analyze")


def prune() -> None:
    """Entry of prune.py."""
    main("prune")


def script() -> None:
    """Entry of the console script: ``nodelens analyze ...``, ``nodelens --help``, ``nodelens --version``."""
    task = next((word for word in sys.argv[1:] if word != "--quiet"), "")
    if task not in TASKS and "=" in task and "LOCAL_RANK" in os.environ:
        task = os.environ.get(_TASK, task)  # a process that Lightning has started with the words of ours, which lack the task
    elif task:
        sys.argv.remove(task)
        os.environ[_TASK] = task
    if task in ("--version", "--help", "-h"):
        print(version() if task == "--version" else _USAGE)
        return
    if task not in TASKS:
        given = f", not {task!r}.{nearest(task, TASKS)}" if task else "; nodelens --help shows examples"
        sys.exit(f"nodelens: the first word is a task, one of {', '.join(TASKS)}{given}")
    main(task)


def main(task: str) -> None:
    """Composes a task's config from the command line and runs it. A user's mistake is reported in one line, with exit code 1."""
    startup.begin()
    here = str(Path.cwd())
    if here not in sys.path:  # a user's own modules in the working folder
        sys.path.insert(0, here)
    for state in (_failed, _there, taken_warnings()):
        state.clear()
    if "--version" in sys.argv[1:]:  # Hydra would print its own
        print(version())
        return
    quiet = "--quiet" in sys.argv[1:]
    sys.argv[1:] = [word for word in sys.argv[1:] if word != "--quiet"] + ["hydra/hydra_logging=none"] * quiet
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read by huggingface_hub when it is imported
    sys.argv[1:] = _rewrite(sys.argv[1:])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 stops no run
    try:
        flags = flags_of(sys.argv[1:])
        lists = flags.help or flags.hydra_help or flags.shell_completion
        if lists or flags.info or flags.cfg:
            register(config_folders(parsed_overrides(flags.overrides), flags.config_dir), imports=not lists)
        else:
            check_weights(parsed_overrides(flags.overrides))
            for cfg in configs(task, flags):
                with config_words():
                    _check(cfg, bool(flags.multirun))
    except (ValueError, OSError) as error:
        sys.exit(_line(error))
    for line in taken_warnings():
        print(f"nodelens: {line}", file=sys.stderr)
    if not (lists or flags.info or flags.cfg):
        from .tasks.progress import be_quiet  # slow imports, which --help does without

        be_quiet(quiet)
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=task)(_job)()
    if _failed:
        sys.exit(1)


def _job(cfg: DictConfig) -> float | None:
    try:
        return run_task(cfg)
    except (ValueError, OSError, MemoryError) as error:
        return _stop(_line(error), error)
    except KeyboardInterrupt as stopped:
        words = str(stopped) or "interrupted"
        sys.exit(f"nodelens: {words}; the same command with hydra.run.dir={cfg.paths.output_dir} continues the run")


def _stop(line: str, error: BaseException) -> float:
    """Ends the run with one line. In a multirun the other jobs continue; under a launcher the error is raised for the launcher."""
    job = HydraConfig.get()
    if os.environ.get("HYDRA_FULL_ERROR"):
        raise error
    if job.mode != RunMode.MULTIRUN:
        remove_traces(Path(job.runtime.output_dir), _there[0])
        sys.exit(line)
    if not str(job.launcher._target_).endswith("BasicLauncher"):
        raise error
    _failed.append(line)
    print(f"{line} (job {job.job.num}: {' '.join(job.overrides.task)})", file=sys.stderr)
    return float("nan")


def _line(error: BaseException) -> str:
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__
    if isinstance(error, OSError) and error.filename:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way = "free some space, or choose another folder" if full else "choose another path or make it readable and writable"
        text = f"{error.filename}: {error.strerror}; {way}"
    return f"nodelens: {text}"


def _rewrite(argv: Sequence[str]) -> list[str]:
    """Puts flags first, as Hydra requires, and overrides with their new keys behind them.

    A group of the task is chosen with or without a leading ``+``, which Hydra would refuse: ``+experiment=quick``.
    Values that Hydra's grammar would misread are quoted: ``layers=blocks[0].output`` and, outside a multirun,
    ``dataset.select=regex:a & loss``.
    """
    overrides = [a for a in argv if ("=" in a or a.startswith("~")) and not a.startswith("-")]
    rest = [a for a in argv if a not in overrides]
    overrides = [_GROUP.sub(lambda m: m[(CONF / m[1]).is_dir()], override) for override in overrides]
    quoted = [_ROLE.sub(r"\1='\2'", override) for override in with_custom_model(with_new_keys(overrides))]
    if not {"-m", "--multirun"} & set(rest):
        quoted = [_SELECT.sub(lambda m: f"{m[1]}='" + m[2].replace("'", "\\'") + "'", override) for override in quoted]
    return rest + quoted


def _check(cfg: DictConfig, multirun: bool) -> None:
    """Raises, before anything is written, for a config that cannot run and for a folder that is taken or cannot be written to."""
    from nodelens.app.tasks.common import verify
    from nodelens.app.tasks.run_folder import check_settings
    from nodelens.app.tasks.run_lock import check_free

    place = cfg.hydra.sweep.dir if multirun else cfg.hydra.run.dir
    if not place:
        raise MistakeError("hydra.run.dir is empty: give a folder, or leave it out for one of its own")
    folder = Path(place)
    _there[:] = [_check_folder(folder)]
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = str(folder.absolute())
        cfg.hydra.job.num, cfg.hydra.job.id = 0, "0"
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    verify(cfg)
    if not multirun:
        _check_folder(Path(cfg.paths.output_dir))
        check_free(Path(cfg.paths.output_dir))
        check_settings(cfg)


def _check_folder(folder: Path) -> Path:
    """The nearest existing folder, the given one included. Raises MistakeError if nothing can be written to it."""
    home = folder.absolute()
    while not home.exists():
        home = home.parent
    try:
        with tempfile.NamedTemporaryFile(dir=home):
            pass
    except OSError as error:
        raise MistakeError(
            f"the output folder {folder} cannot be written: {home}: {error.strerror}; choose another, hydra.run.dir=<folder>"
        ) from None
    return home
