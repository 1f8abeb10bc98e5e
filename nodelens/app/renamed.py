"""Renamed config keys: for one version the old ones work too, on the command line and in a user's YAML, with a warning."""

import copy
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from .entries import from_source
from .search_path import CONF

RENAMED = {
    "plan_only": "dry_run",
    "forecast": "cost",
    "wide": "covariance",
    "budget.passes": "budget.max_passes",
    "recover": "finetune",
    "inexact": "allow_approximate",
    "axes": "custom_groups",
    "nan": "nan_policy",
    "analysis.geometry.wide": "analysis.geometry.covariance",
    "analysis.geometry.passes": "analysis.geometry.max_passes",
    "metrics.*.control": "metrics.*.permutations",
}
OPTIONS = {"recover": {"finetune": "default"}, "nan": {"remove": "drop"}}  # values of a renamed key that were renamed as well
_warnings: dict[str, None] = {}  # in the order found, each once
_own: dict[tuple[Path, int], ConfigResult] = {}  # the package's own files, by path and time of change


def taken_warnings() -> list[str]:
    """A line for each old key found since the last call."""
    found = list(_warnings)
    _warnings.clear()
    return found


def with_new_keys(overrides: Sequence[str]) -> list[str]:
    """Overrides with the new keys in place of the old ones."""
    return [re.sub(r"^(\+\+|\+|~|)([\w.]+)(?:=(.*))?$", _new_override, line, flags=re.DOTALL) for line in overrides]


def rename_in_files() -> None:
    """From now on, in this process, Hydra reads a user's YAML files with the new keys in place of the old ones."""
    Plugins.instance()  # registers Hydra's own source, which this one replaces
    SourcesRegistry.instance().types["file"] = FileConfigSource


class FileConfigSource(file_config_source.FileConfigSource):
    """Hydra's source of YAML files, with the new keys. Hydra requires this class name of a source of files."""

    def load_config(self, config_path: str) -> ConfigResult:
        file = Path(self.path) / self._normalize_file_name(config_path)
        if file.is_relative_to(CONF) and file.is_file():
            key = file, file.stat().st_mtime_ns
            if key not in _own:  # reading YAML takes a quarter of a composition, and a command composes twice
                _own[key] = super().load_config(config_path)
            return copy.deepcopy(_own[key])
        found = super().load_config(config_path)
        if isinstance(found.config, DictConfig) and not file.is_relative_to(CONF):
            package = (found.header or {}).get("package")
            path = "" if package == "_global_" else package or os.path.dirname(config_path).replace("/", ".")  # noqa: PTH120
            before = OmegaConf.to_container(found.config, resolve=False)
            after = _new_node(before, tuple(filter(None, path.split("."))), f" (in {self.path}/{config_path})")
            found.config = OmegaConf.create(after) if after != before else found.config
        return found


def _new_override(line: re.Match) -> str:
    mark, key, value = line.groups()
    path: tuple[str, ...] = ()
    for name in key.split("."):
        path = (*path, _new_name((*path, name)))
    new = ".".join(path)
    value = OPTIONS.get(key, {}).get(value, value) if new != key else value
    return f"{mark}{new}" + ("" if value is None else f"={value}")


def _new_node(node: Any, path: tuple[str, ...], place: str) -> Any:
    if not isinstance(node, dict):
        return node
    found = {}
    for key, value in node.items():
        if key == "defaults" and isinstance(value, list):
            found[key] = [_new_default(item, place) for item in value]
        else:
            new = _new_name((*path, str(key)), place, node.get("_target_")) if isinstance(key, str) else key
            found[new] = _new_node(value, (*path, str(new)), place)
    return found


def _new_default(item: Any, place: str) -> Any:
    """An element of a defaults list, such as ``override /recover: finetune``."""
    if not isinstance(item, dict) or len(item) != 1:
        return item
    ((key, value),) = item.items()
    before, group = re.fullmatch(r"(.*[ /])?(.*)", str(key)).groups(default="")  # type: ignore[union-attr]
    new = _new_name((group,), place)
    return item if new == group else {before + new: OPTIONS.get(group, {}).get(value, value) if isinstance(value, str) else value}


def _new_name(path: tuple[str, ...], place: str = "", target: str | None = None) -> str:
    """The last part of a key, as it is called now."""
    for old, new in RENAMED.items():
        parts, name = old.split("."), new.rpartition(".")[2]
        if len(parts) == len(path) and all(part in ("*", word) for part, word in zip(parts, path, strict=True)):
            if "*" in parts and not _takes(path[1], target, name):
                continue
            renamed = f"{'.'.join(path)} is now called {'.'.join((*path[:-1], name))}"
            _warnings[f"{renamed}; the old key works in this version only{place}"] = None
            return name
    return path[-1]


def _takes(metric: str, target: str | None, option: str) -> bool:
    """Whether a metric has an option: given by its class or by its name."""
    entries = from_source()["metrics"]
    known = [each for name, each in entries.items() if (each["_target_"] == target if target else name == metric)]
    return any(option in each for each in known)
