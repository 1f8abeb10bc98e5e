"""One line for each error of composing a config: the key, what is wrong with it, and what to write instead."""

import itertools
import re
from collections.abc import Sequence
from typing import Any, NoReturn

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nodelens.messages import nearest

from .search_path import CONF, MistakeError

ERRORS = (HydraException, OmegaConfBaseException, ValueError)
_NAMED = ("metrics", "criterion", "allocation", "analysis", "logger", "callbacks")  # groups of which several may be chosen


def parsed_overrides(lines: Sequence[str]) -> list[Override]:
    """Overrides as Hydra reads them. Raises MistakeError for one that it cannot read."""
    try:
        return OverridesParser.create().parse_overrides(list(lines))
    except OverrideParseException as error:
        raise MistakeError(
            f"{error.override}: cannot be read as key=value; quote it, as in 'metrics=[rq,synergy]', and a path "
            "with = in it as \"ckpt_path='a=b.ckpt'\""
        ) from None


def explain(task: str, parsed: Sequence[Override], groups: Sequence[str], search: Sequence[str], error: Exception) -> NoReturn:
    """Raises MistakeError that names the first unknown key among the overrides, else Hydra's reason in one line.

    groups: the overrides that choose groups; with these alone, and ``search``, the config composes.
    """
    try:
        config: Any = OmegaConf.to_container(hydra.compose(task, overrides=[*groups, *search]), resolve=False)
    except ERRORS:
        config = {}
    keys = _keys(config)
    for override in parsed:
        key = override.key_or_group
        unknown = keys and not override.is_add() and not override.is_force_add() and key not in keys
        if unknown and not key.startswith("hydra") and not (CONF / key).is_dir():
            raise MistakeError(_unknown_key(task, key, str(override.input_line), config, keys)) from None
    raise MistakeError(_reason(error, {o.key_or_group: str(o.input_line).partition("=")[2] for o in parsed})) from None


def _unknown_key(task: str, key: str, line: str, config: dict[str, Any], keys: list[str]) -> str:
    """What to write instead of a key that the config does not have."""
    group, _, rest = key.partition(".")
    if group == "experiment":
        return f"{key}: an experiment's settings are keys of the task, without a prefix: write {line.partition('.')[2]}"
    name = rest.partition(".")[0]
    chosen = config.get(group)
    if group in _NAMED and isinstance(chosen, dict) and name not in chosen and (near := nearest(name, chosen)):
        return f"no key {key!r} in the config of {task}: {group} has {', '.join(chosen)}.{near}"
    if group in _NAMED and isinstance(chosen, dict) and rest and name not in chosen:
        every = ",".join([*chosen, name])
        return f"{key}: {name} is not among the chosen {group} ({', '.join(chosen) or 'none'}); choose it too: '{group}=[{every}]'"
    if chosen == {} and rest:
        return f"{group} is empty: a new entry has a leading +, as in +{line}"
    deeper = [known for known in keys if known.endswith(f".{key}")]
    near = nearest(key, keys) or (f" Did you mean {' or '.join(map(repr, deeper[:3]))}?" if deeper else "")
    return f"no key {key!r} in the config of {task}.{near} (--cfg job lists all)"


def _reason(error: Exception, given: dict[str, str]) -> str:
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    missing = re.search(r"Could not find '(.*)'", str(error))
    if missing:
        options = itertools.takewhile(lambda line: not line.startswith("Config search path"), lines[2:])
        return f"no option {missing[1]!r}; available: {', '.join(options)}"
    place = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    if place in given and lines and "is not a ListConfig" in lines[0]:
        return f"{place} is {given[place]}; it takes a list: '{place}=[{given[place]}]'"
    return f"{place}: {lines[0]}" if place else lines[0] if lines else type(error).__name__


def _keys(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return []
    return [k for key, value in node.items() for k in (f"{prefix}{key}", *_keys(value, f"{prefix}{key}."))]
