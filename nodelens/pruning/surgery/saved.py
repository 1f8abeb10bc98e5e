"""The files of a saved pruned model, read and checked before anything is built or allocated from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nodelens.messages import shown
from nodelens.pruning.removal_plan import RemovalPlan, check_digests
from nodelens.results.files import checked, read_json

FILES = ("model.safetensors", "plan.json", "config.json")
ORIGIN = "origin.json"  # how the dense model is built, where config.json is one of transformers
Shapes = dict[str, tuple[torch.dtype, list[int]]]
_DTYPES = {"BOOL": "bool", "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "U8": "uint8", "I8": "int8"}
_DTYPES |= {"I16": "int16", "I32": "int32", "I64": "int64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


@dataclass(frozen=True)
class SavedModel:
    """What a folder says about a pruned model; names, shapes and dtypes of the three files agree with each other.

    dense, kept: tensors before and after pruning; stored: those in model.safetensors, where tied tensors have one name only;
    buffers: dtypes of what is not stored; numbers: {module: {attribute: count}}; added_bias: modules that got a bias.
    """

    folder: Path
    origin_file: Path
    origin: Mapping[str, Any]
    dense: Shapes
    kept: Shapes
    stored: Shapes
    buffers: Mapping[str, torch.dtype]
    numbers: Mapping[str, Mapping[str, int]]
    added_bias: frozenset[str]

    @classmethod
    def read(cls, folder: Path) -> "SavedModel":
        """Raises FileNotFoundError for a missing file, ValueError, with file and field, for content that is damaged or changed."""
        origin_path = folder / (ORIGIN if (folder / ORIGIN).is_file() else "config.json")
        for name in (*FILES, origin_path.name):
            if not (folder / name).is_file():
                absent = f"is no folder; that of a pruned model holds {name}"
                lacks = f"holds no pruned model: {name} is missing" if folder.is_dir() else absent
                raise FileNotFoundError(f"{folder.resolve()} {lacks}")
            checked(folder / name)
        where, origin_file = f"{folder / 'plan.json'}", f"{origin_path}"
        content, origin = read_json(folder / "plan.json"), read_json(origin_path)
        plan = RemovalPlan.read(content, where)
        if not isinstance(origin, dict):
            raise ValueError(f"{origin_file} is {shown(origin)}; it must be a dictionary that says how the dense model is built")
        if "config" in content:  # versions before 0.2 did not write it
            check_digests(origin, content["config"], origin_file)
        if content.get("apply", "slice") not in ("slice", "mask", "scale"):
            raise ValueError(f"{where}: apply is {shown(content['apply'])}; it must be slice, mask or scale")
        dense, kept = _shapes(content, "dense", where), _shapes(content, "kept", where)
        added = frozenset(_names(plan.about.get("added_bias", []), "about.added_bias", where))
        _check_kept(dense, kept, added, where)
        stored = _stored(folder / "model.safetensors")
        _check_stored(stored, kept, folder)
        buffers = {name: dtype_of(value, f"buffers.{name}", where) for name, value in _mapping(content, "buffers", where).items()}
        return cls(folder, origin_path, origin, dense, kept, stored, buffers, _numbers(content, where), added)


def dtype_of(name: Any, field: str, where: str) -> torch.dtype:
    """The dtype of that name. Raises ValueError for a name that torch does not have."""
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{where}: {field} names the dtype {shown(name)}, which torch does not have")
    return dtype


def _mapping(content: Mapping[str, Any], field: str, where: str) -> dict[str, Any]:
    value = content.get(field, {})
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {field} is {shown(value)}; it must be a dictionary")
    return value


def _names(value: Any, field: str, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{where}: {field} is {shown(value)}; it must be a list of names")
    return value


def _shapes(content: Mapping[str, Any], field: str, where: str) -> Shapes:
    """Tensors of the plan, each [dtype, shape]."""
    found: Shapes = {}
    for name, entry in _mapping(content, field, where).items():
        shape = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
            raise ValueError(
                f"{where}: {field}.{name} is {shown(entry)}; it must be a dtype and a shape, such as ['float32', [4, 3]]"
            )
        found[name] = (dtype_of(entry[0], f"{field}.{name}", where), shape)
    if not found:
        raise ValueError(f"{where}: {field} is missing or empty; it must list the tensors of the model")
    return found


def _numbers(content: Mapping[str, Any], where: str) -> dict[str, dict[str, int]]:
    found = _mapping(content, "numbers", where)
    for path, numbers in found.items():
        if not isinstance(numbers, dict):
            raise ValueError(f"{where}: numbers.{path} is {shown(numbers)}; it must be a dictionary of counts")
        for attribute, value in numbers.items():
            if type(value) is not int or not 0 < value < 2**48:
                raise ValueError(f"{where}: numbers.{path}.{attribute} is {shown(value)}; it must be a count, 1 or more")
    return found


def _check_kept(dense: Shapes, kept: Shapes, added: frozenset[str], where: str) -> None:
    """Every kept tensor is one of the dense model's, of the same number of dimensions and no larger, or an added bias."""
    for name, (_, shape) in kept.items():
        path, _, tensor = name.rpartition(".")
        if name not in dense:
            if tensor != "bias" or path not in added or len(shape) != 1:
                raise ValueError(f"{where}: kept has a tensor {name} that the dense model does not have")
            continue
        before = dense[name][1]
        if len(shape) != len(before) or any(map(int.__gt__, shape, before)):
            raise ValueError(
                f"{where}: kept.{name} has the shape {shape}, dense.{name} has {before}: pruning makes no tensor larger"
            )
    missing = next((name for name in dense if name not in kept), None)
    if missing is not None:
        raise ValueError(f"{where}: kept has no tensor {missing}, which the dense model has")


def _stored(file: Path) -> Shapes:
    """The header of the weights: what safetensors has checked against the size of the file."""
    try:
        with safe_open(file, "pt") as held:
            slices = {name: held.get_slice(name) for name in held.keys()}  # noqa: SIM118  not a dict
            return {
                name: (dtype_of(_DTYPES.get(part.get_dtype()), name, str(file)), list(part.get_shape()))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _check_stored(stored: Shapes, kept: Shapes, folder: Path) -> None:
    for name, (dtype, shape) in stored.items():
        if name not in kept:
            raise ValueError(f"{folder}: {name} has the shape {shape} in model.safetensors, the plan does not have it")
        if kept[name] != (dtype, shape):
            planned = f"{_dtype_name(kept[name][0])} {kept[name][1]}"
            raise ValueError(f"{folder}: {name} is {_dtype_name(dtype)} {shape} in model.safetensors and {planned} in plan.json")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
