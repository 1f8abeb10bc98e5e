"""The command line: ``python -m nodelens.cli analyze ...``, and what train.py, analyze.py and prune.py call."""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .checks import nearest
from .config import CONF, TASKS, register, run, with_custom_model


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
    """Entry of the console script: ``nodelens analyze ...``."""
    task = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if task not in TASKS:
        sys.exit(f"nodelens: the first word is a task, one of {', '.join(TASKS)}, not {task!r}.{nearest(task, TASKS)}")
    main(task)


def main(task: str) -> None:
    """Composes a task's config from the command line and runs it; a mistake ends in one line and exit code 1."""
    if os.getcwd() not in sys.path:  # a user's own module beside the place where the script was started
        sys.path.insert(0, os.getcwd())
    register()
    flags = [a for a in sys.argv[1:] if a.startswith("-")]
    sys.argv[1:] = _rewrite(sys.argv[1:])
    plain = not any(f in ("-h", "--help", "-i", "--info", "--hydra-help", "--version", "--cfg", "-c") for f in flags)
    if plain:
        _check(task, sys.argv[1:])
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=task)(_job)()


def _job(cfg: DictConfig) -> float | None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    try:
        return run(cfg)
    except (ValueError, OSError, MemoryError) as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN or os.environ.get("HYDRA_FULL_ERROR"):
            raise
        sys.exit(_line(error))


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}; choose another path or make it readable and writable"
    return f"nodelens: {text}"


def _rewrite(argv: Sequence[str]) -> list[str]:
    overrides = [a for a in argv if "=" in a and not a.startswith("-")]
    rest = [a for a in argv if a not in overrides]
    return rest + with_custom_model(overrides)


def _check(task: str, argv: Sequence[str]) -> None:
    """Ends with one line where an override names what is not there; Hydra's own messages are long, or name no way out."""
    overrides = [a for a in argv if not a.startswith("-") and ("=" in a or a.startswith("~"))]
    folders = [CONF, *(Path(argv[k + 1]) for k, a in enumerate(argv[:-1]) if a in ("--config-dir", "-cd"))]
    multirun = any(a in ("-m", "--multirun") for a in argv)
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        sys.exit(f"nodelens: {error.override}: cannot be read as key=value; quote it, as in 'metrics=[rq,synergy]', and a path "
                 "with = in it as \"ckpt_path='a=b.ckpt'\"")
    for override in parsed:
        _check_choice(override, folders)
    search = [f"hydra.searchpath=[{','.join(f'file://{f.absolute()}' for f in folders[1:])}]"] if folders[1:] else []
    fixed = [o.input_line for o in parsed if not o.is_sweep_override() and not str(o.key_or_group).startswith("hydra/launcher")]
    cfg = _compose(task, parsed, [str(o) for o in fixed], search)
    if not multirun:
        _check_folder(cfg, any(o.key_or_group == "hydra.run.dir" for o in parsed))


def _check_choice(override: Override, folders: list[Path]) -> None:
    group = override.key_or_group
    options = sorted({p.stem for folder in folders for p in (folder / group).glob("*.yaml")})
    if not options or override.is_delete():
        return
    value: Any = override._value
    choices = value.list if isinstance(value, ChoiceSweep) else [value]
    for choice in choices:
        for name in choice if isinstance(choice, list) else [choice]:
            name = name.text if isinstance(name, QuotedString) else name
            if name is None and group in ("experiment", "logger", "callbacks"):
                continue
            if isinstance(name, (str, type(None))) and name not in options:
                sys.exit(f"nodelens: {group}: no option {str(name)!r}.{nearest(str(name), options)} Available: {', '.join(options)}")


def _compose(task: str, parsed: list[Override], overrides: list[str], search: list[str]) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3", job_name=task):
        try:
            return hydra.compose(task, overrides=overrides + search, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            _explain(task, parsed, search, error)
        finally:
            GlobalHydra.instance().clear()
    raise AssertionError("unreachable")


def _explain(task: str, parsed: list[Override], search: list[str], error: Exception) -> None:
    """Finds the key that is not there among the overrides, else repeats the reason in a line."""
    groups = [str(o.input_line) for o in parsed if (CONF / o.key_or_group).is_dir() and not o.is_sweep_override()]
    try:
        keys = _keys(OmegaConf.to_container(hydra.compose(task, overrides=groups + search), resolve=False))
    except (HydraException, OmegaConfBaseException, ValueError):
        keys = []
    for override in parsed:
        key = override.key_or_group
        unknown = keys and not override.is_add() and not override.is_force_add() and key not in keys
        if unknown and not key.startswith("hydra") and not (CONF / key).is_dir():
            sys.exit(f"nodelens: no key {key!r} in the config of {task}.{nearest(key, keys)} (python {task}.py --cfg job shows all)")
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    place = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    sys.exit(f"nodelens: {place + ': ' if place else ''}{lines[0] if lines else type(error).__name__}")


def _keys(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return []
    return [k for key, value in node.items() for k in (f"{prefix}{key}", *_keys(value, f"{prefix}{key}."))]


def _check_folder(cfg: DictConfig, chosen: bool) -> None:
    """Ends with one line where the run's folder cannot be written: before anything is computed."""
    folder = Path(cfg.hydra.run.dir)
    try:
        if chosen:
            folder.mkdir(parents=True, exist_ok=True)
        else:
            while not folder.exists():
                folder = folder.parent
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        sys.exit(f"nodelens: the output folder {folder} cannot be written: {error.strerror}; choose another, hydra.run.dir=<folder>")


if __name__ == "__main__":
    script()
