"""What results are of: fingerprints of model, data and code, compared before anything in a folder is used again."""

import hashlib
import sys
from collections.abc import Mapping
from functools import cache
from importlib import metadata as packages
from pathlib import Path
from typing import Any

from torch import nn

from .files import checked, holds_results, read_json, write_json

_WAYS = {
    "model": ("a model with fingerprint", "put the former weights back"),
    "initial": ("initial weights with fingerprint", "put the former ones back"),
    "data": ("data with fingerprint", "put the former data back"),
    "code": ("the code", "go back to it"),
}


def code_version(model: nn.Module | None = None) -> str:
    """Version of nodelens, and a hash of its source files and those that define the modules of a model.

    Modules of torch, and classes without a file, as in a notebook, are not part of the hash.
    """
    digest = _of_package(Path(__file__).parents[1]).copy()
    for path in _files(model) if model is not None else ():
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    try:
        version = packages.version("nodelens")
    except packages.PackageNotFoundError:  # a checkout that is not installed
        version = "of a checkout"
    return f"nodelens {version}, sources {digest.hexdigest()[:12]}"


@cache  # the code that runs is what was read when the process began
def _of_package(home: Path) -> Any:
    digest = hashlib.sha256()
    for path in sorted(path for path in home.rglob("*") if path.suffix in (".py", ".c")):
        digest.update(f"{path.relative_to(home).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest


def check_identity(folder: Path, identity: Mapping[str, str], write: bool = True) -> None:
    """Compares fingerprints with those in ``identity.json``, and writes them there if the folder has no results yet.

    identity: of some of model, initial, data and code; only those are compared. Raises ValueError if the folder has results of
    another model, of other data or code, or results without fingerprints, and leaves it as it is.
    """
    file = folder / "identity.json"
    if not holds_results(folder):
        if write:
            write_json(file, dict(identity))
        return
    if not file.is_file():
        raise ValueError(
            f"{folder} holds results without identity.json, the fingerprints of the model, data and code behind them: "
            "choose another folder"
        )
    stored = read_json(checked(file))
    for key, new in identity.items():
        if key in stored and stored[key] != new:
            what, way = _WAYS[key]
            raise ValueError(f"{folder} holds results of {what} {stored[key]}, this run has {new}: choose another folder, or {way}")


def _files(model: nn.Module) -> list[Path]:
    """The source files of the classes of a model's modules, without those of torch and nodelens."""
    names = {type(module).__module__ for module in model.modules()}
    own = (name for name in names if name.split(".")[0] not in ("torch", "nodelens"))
    files = (getattr(sys.modules.get(name), "__file__", None) for name in own)
    return sorted(path for file in files if file and (path := Path(file)).suffix == ".py" and path.is_file())
