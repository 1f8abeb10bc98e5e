"""State dicts of strangers: what a file declares is checked before it is read, and its tensors before one is copied."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.messages import shown


def check_size(file: Path) -> None:
    """Raises ValueError for a torch file whose entries declare more bytes than it has, as compressed or shared entries do."""
    try:
        with zipfile.ZipFile(file) as entries:
            declared = sum(entry.file_size for entry in entries.infolist())
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):  # the format before torch 1.6, or no checkpoint at all
        return
    size = file.stat().st_size
    if packed or declared > size:
        raise ValueError(f"{file} declares {declared} bytes in a file of {size} (torch.save does not compress)")


def check_tensors(state: Mapping[Any, Any], file: Path, own: Mapping[str, Tensor] | None = None) -> None:
    """Raises ValueError for a name that is no text, a tensor without plain values, or one of another kind than the model's.

    Plain are strided tensors with values: not sparse, on the meta device, quantized, nested or of a subclass. Floats of another
    precision are of the same kind; integers, complex numbers and booleans are kinds of their own.
    """
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise ValueError(f"{file}: a tensor is named {shown(name)}; names are texts, as model.state_dict() has them")
        if isinstance(tensor, Tensor) and (reason := _not_plain(tensor)):
            raise ValueError(f"{file}: {name} is {reason}; save plain tensors: tensor.to_dense().cpu()")
        if own is not None and name in own and _kind(tensor) != _kind(own[name]):
            raise ValueError(f"{file}: {name} has the dtype {tensor.dtype} in the file and {own[name].dtype} in the model")


def _not_plain(tensor: Tensor) -> str:
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.is_nested:
        return "nested"
    if tensor.layout is not torch.strided:
        return f"sparse ({tensor.layout})"
    return "on the meta device, without values" if tensor.is_meta else "quantized" if tensor.is_quantized else ""


def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point() or tensor.is_complex():
        return "complex" if tensor.is_complex() else "float"
    return "bool" if tensor.dtype == torch.bool else "integer"
