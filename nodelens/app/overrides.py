"""Checks a command line before Hydra runs it. Each error is one line that says how to fix it."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, QuotedString
from omegaconf import DictConfig

from nodelens.compat.names import LEFT_OUT
from nodelens.messages import nearest

from .config import register
from .explain import ERRORS, explain, parsed_overrides
from .search_path import CONF, SEARCHPATH, MistakeError, config_folders

_SHOWN = 16
_WEIGHTS = ("ckpt_path", "initial_path", "model.weights")
_ZOO = "a network of torchvision or timm is chosen by name, as in model=torchvision model.name=vgg16 or model=timm model.name=vgg16"
_MOST = 64  # jobs of a sweep that are composed beforehand


def flags_of(argv: Sequence[str]) -> Namespace:
    """Hydra's flags and the overrides. Raises MistakeError for an unknown flag and for a word that is not key=value."""
    parser = get_args_parser()
    parser.error = _refuse_flag  # type: ignore[method-assign]
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        way = f"settings are key=value, as in {unknown[0].lstrip('-').partition('=')[0]}=...; --hydra-help lists the flags"
        raise MistakeError(f"{unknown[0]}: there is no such flag; {way}")
    for word in flags.overrides:
        if ("=" not in word and not word.startswith("~")) or word.startswith("="):
            raise MistakeError(f"{word!r} sets nothing: settings are key=value, as in model=resnet18; --help lists them")
    return flags


def _refuse_flag(message: str) -> NoReturn:
    """Raises MistakeError in place of argparse's usage, which is eight lines long."""
    raise MistakeError(f"{message.removeprefix('argument ')}; --hydra-help lists all flags")


def configs(task: str, flags: Namespace) -> Iterator[DictConfig]:
    """The config of every job that a command line starts, with Hydra's part.

    Each choice of a sweep is composed once, not in every combination. Raises MistakeError for an unknown option or key, with the
    nearest name, and for a wrong type.
    """
    parsed = parsed_overrides(flags.overrides)
    folders = config_folders(parsed, flags.config_dir)
    register(folders, imports=False)  # the entries are the same, and importing torch takes a second
    for override in parsed:
        _check_choice(override, folders)
        if override.is_sweep_override() and not flags.multirun:
            raise MistakeError(
                f"{override.input_line} names several values: start with -m for one job per value, or write "
                f"{override.key_or_group}=[...] for all of them in one job"
            )
    places = ",".join(f"'file://{folder.absolute()}'" for folder in folders[1:])
    search = [f"{SEARCHPATH}=[{places}]"] if places else []
    for lines in _jobs([override for override in parsed if override.key_or_group != SEARCHPATH]):
        yield _compose(task, parsed, lines, search)


def _check_choice(override: Override, folders: list[Path]) -> None:
    group = override.key_or_group
    stored = ConfigStore.instance().repo.get(group)
    names = {path.name for folder in folders for path in (folder / group).glob("*.yaml")}
    options = sorted(name.removesuffix(".yaml") for name in names.union(stored if isinstance(stored, dict) else ()))
    if not options or override.is_delete() or group.startswith("hydra"):  # Hydra checks its own groups
        return
    value: Any = override._value
    if isinstance(value, Glob):
        return
    for choice in value.list if isinstance(value, ChoiceSweep) else [value]:
        for name in choice if isinstance(choice, list) else [choice]:
            name = name.text if isinstance(name, QuotedString) else name
            if name is None and group != "experiment":
                raise MistakeError(f"{group}=null chooses nothing: choose one of {_listed(options)}")
            if name in LEFT_OUT and name not in options and group in ("metrics", "criterion"):
                raise MistakeError(f"{group}: no option {name!r}, a name of NodeLens that is left out: {LEFT_OUT[name]}")
            if name is not None and str(name) not in options:
                available = f"Available: {_listed(options)}" + (f"; {_ZOO}" if group == "model" else "")
                raise MistakeError(f"{group}: no option {str(name)!r}.{nearest(str(name), options)} {available}")


def check_weights(parsed: Sequence[Override]) -> None:
    """Raises MistakeError for weights that do not exist, before anything is imported that takes a while."""
    for override in parsed:
        if override.key_or_group in _WEIGHTS and not override.is_delete():
            value: Any = override._value
            for given in value.list if isinstance(value, ChoiceSweep) else [value]:
                _check_path(override.key_or_group, given.text if isinstance(given, QuotedString) else given)


def _check_path(key: str, path: Any) -> None:
    if isinstance(path, str) and path and "${" not in path and not Path(path).exists():
        raise MistakeError(
            f"{key}: there is nothing at {Path(path).absolute()}; give a .safetensors file, a checkpoint, a folder that holds "
            "model.safetensors, or the folder of a training run"
        )


def _listed(options: list[str]) -> str:
    """Names in a line of readable length; there are more than a hundred metrics."""
    rest = len(options) - _SHOWN
    return ", ".join(options) if rest <= _SHOWN else f"{', '.join(options[:_SHOWN])} and {rest} more, which --help lists"


def _jobs(parsed: list[Override]) -> list[list[str]]:
    columns = []
    for override in parsed:
        if not override.is_sweep_override():
            columns.append([str(override.input_line)])
        elif not isinstance(override._value, Glob):
            columns.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
    longest = min(_MOST, max(map(len, columns), default=1))
    return [[column[min(k, len(column) - 1)] for column in columns] for k in range(longest)]


def _first_groups(parsed: list[Override]) -> list[str]:
    """The choices of groups in the first job."""
    return [line for line in _jobs([o for o in parsed if (CONF / o.key_or_group).is_dir()])[0] if not line.startswith("hydra")]


def _compose(task: str, parsed: list[Override], lines: list[str], search: list[str]) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3", job_name=task):
        try:
            return hydra.compose(task, overrides=lines + search, return_hydra_config=True)
        except ERRORS as error:
            explain(task, parsed, _first_groups(parsed), search, error)
        finally:
            GlobalHydra.instance().clear()
