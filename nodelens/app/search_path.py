"""The folders in which config files are looked up: those of the package and those that a user adds."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override

_PACKAGE = Path(__file__).parents[1]
# in a wheel, in a checkout
CONF = next(p for p in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if (p / "analyze.yaml").is_file())
SEARCHPATH = "hydra.searchpath"


class MistakeError(ValueError):
    """A command line that cannot run. The message is written for the person who typed it."""


def config_folders(parsed: Sequence[Override], config_dir: str | None = None) -> list[Path]:
    """The package's folder, then those of ``--config-dir`` and ``hydra.searchpath``.

    Raises MistakeError for a folder that does not exist.
    """
    if config_dir and not Path(config_dir).is_dir():
        raise MistakeError(f"--config-dir: no folder at {Path(config_dir).absolute()}")
    value: Any = next((override.value() for override in parsed if override.key_or_group == SEARCHPATH), None) or []
    folders = [CONF, *([Path(config_dir)] if config_dir else [])]
    for place in [value] if isinstance(value, str) else value:
        scheme, _, rest = place.rpartition("://")
        folder = _folder_of_package(rest) if scheme == "pkg" else Path(rest).absolute()
        if folder is None or not folder.is_dir():
            raise MistakeError(f"{SEARCHPATH}: no folder at {folder or place}")
        folders.append(folder)
    return folders


def _folder_of_package(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name.replace("/", "."))
    except (ImportError, ValueError):
        return None
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None
