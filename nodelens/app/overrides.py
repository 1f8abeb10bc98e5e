"""Checks a command line before Hydra runs it. Each error is one line that says how to fix it."""

import itertools
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, QuotedString
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nodelens.messages import nearest

from .config import register
from .search_path import CONF, SEARCHPATH, MistakeError, config_folders

_ERRORS = (HydraException, OmegaConfBaseException, ValueError)
_SHOWN = 16
_MOST = 64  # jobs of a sweep that are composed beforehand


def flags_of(argv: Sequence[str]) -> Namespace:
    """Hydra's flags and the overrides. Raises MistakeError for an unknown flag and for a word that is not key=value."""
    flags, unknown = get_args_parser().parse_known_args(argv)
    if unknown:
        raise MistakeError(f"{unknown[0]}: there is no such flag; --hydra-help lists all")
    for word in flags.overrides:
        if "=" not in word and not word.startswith("~"):
            raise MistakeError(f"{word!r} sets nothing: settings are key=value, as in model=resnet18; --help lists them")
    return flags


def configs(task: str, flags: Namespace) -> Iterator[DictConfig]:
    """The config of every job that a command line starts, with Hydra's part.

    Each choice of a sweep is composed once, not in every combination. Raises MistakeError for an unknown option or key, with the
    nearest name, and for a wrong type.
    """
    parsed = parsed_overrides(flags.overrides)
    folders = config_folders(parsed, flags.config_dir)
    register(folders, imports=False)  # names are enough to see a typing error, and importing torch takes a second
    for override in parsed:
        _check_choice(override, folders)
        if override.is_sweep_override() and not flags.multirun:
            raise MistakeError(
                f"{override.input_line} names several values: start with -m for one job per value, or write "
                f"{override.key_or_group}=[...] for all of them in one job"
            )
    register(folders)
    places = ",".join(f"'file://{folder.absolute()}'" for folder in folders[1:])
    search = [f"{SEARCHPATH}=[{places}]"] if places else []
    for lines in _jobs([override for override in parsed if override.key_or_group != SEARCHPATH]):
        yield _compose(task, parsed, lines, search)


def parsed_overrides(lines: Sequence[str]) -> list[Override]:
    """Overrides as Hydra reads them. Raises MistakeError for one that it cannot read."""
    try:
        return OverridesParser.create().parse_overrides(list(lines))
    except OverrideParseException as error:
        raise MistakeError(
            f"{error.override}: cannot be read as key=value; quote it, as in 'metrics=[rq,synergy]', and a path "
            "with = in it as \"ckpt_path='a=b.ckpt'\""
        ) from None


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
            if name is not None and str(name) not in options:
                raise MistakeError(f"{group}: no option {str(name)!r}.{nearest(str(name), options)} Available: {_listed(options)}")


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


def _compose(task: str, parsed: list[Override], lines: list[str], search: list[str]) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3", job_name=task):
        try:
            return hydra.compose(task, overrides=lines + search, return_hydra_config=True)
        except _ERRORS as error:
            _explain(task, parsed, search, error)
        finally:
            GlobalHydra.instance().clear()


def _explain(task: str, parsed: list[Override], search: list[str], error: Exception) -> NoReturn:
    """Raises MistakeError that names the first unknown key among the overrides, else Hydra's reason in one line."""
    groups = [line for line in _jobs([o for o in parsed if (CONF / o.key_or_group).is_dir()])[0] if not line.startswith("hydra")]
    try:
        keys = _keys(OmegaConf.to_container(hydra.compose(task, overrides=groups + search), resolve=False))
    except _ERRORS:
        keys = []
    for override in parsed:
        key = override.key_or_group
        unknown = keys and not override.is_add() and not override.is_force_add() and key not in keys
        if unknown and not key.startswith("hydra") and not (CONF / key).is_dir():
            raise MistakeError(
                f"no key {key!r} in the config of {task}.{nearest(key, keys)} (python {task}.py --cfg job lists all)"
            ) from None
    raise MistakeError(_reason(error)) from None


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    missing = re.search(r"Could not find '(.*)'", str(error))
    if missing:
        options = itertools.takewhile(lambda line: not line.startswith("Config search path"), lines[2:])
        return f"no option {missing[1]!r}; available: {', '.join(options)}"
    place = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    return f"{place}: {lines[0]}" if place else lines[0] if lines else type(error).__name__


def _keys(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return []
    return [k for key, value in node.items() for k in (f"{prefix}{key}", *_keys(value, f"{prefix}{key}."))]
