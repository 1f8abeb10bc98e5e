"""Loads weights from untrusted files: runs no code in them, and copies nothing unless all weights fit."""

import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .foreign import check_size, check_tensors

_SAVE = "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
# errors of torch's restricted unpickler on bytes that are not a checkpoint: they are read as instructions until one fails
_UNREADABLE = (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, ValueError, TypeError, AttributeError)


def load_weights(net: nn.Module, path: str | Path) -> dict[str, Any] | None:
    """Copy stored weights into `net`; returns the config stored with them ("nodelens_config"), or None.

    path: a `.safetensors` file, a folder that holds `model.safetensors`, or a torch file with a plain state dict or a
    Lightning checkpoint ("state_dict", keys with or without the prefix "net."). No code in the file is run.
    Raises: FileNotFoundError if there is no file; ValueError if it holds no weights, or weights that do not fit. On an
    error, `net` is unchanged.
    """
    file = _find(path)
    stored = _read(file)
    config = stored.get("nodelens_config")
    state = stored.get("state_dict", stored)
    if isinstance(state, Mapping):
        check_tensors(state, file)
    state, own = _tensors(state, file), net.state_dict()
    state = _without_prefix(state, own)
    _check_names(state, own, file)
    _check_shapes(state, own, file)
    check_tensors(state, file, own)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])
    return config if isinstance(config, dict) else None


def training_state(path: str | Path) -> bool:
    """Whether a file is a Lightning checkpoint that training can resume from. Raises the errors of load_weights."""
    return {"state_dict", "optimizer_states", "pytorch-lightning_version"} <= _read(_find(path)).keys()


def _find(path: str | Path) -> Path:
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(
            f"no weights at {file.resolve()}; give a .safetensors file, a folder that holds model.safetensors, or a checkpoint"
        )
    return file.resolve()


def _read(file: Path) -> Mapping[str, Any]:
    check_size(file)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with warnings.catch_warnings(action="ignore"):  # torch's advice on foreign pickles, which our error repeats
            stored = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, *_UNREADABLE) as error:
        raise _not_weights(file) from error
    if not isinstance(stored, Mapping):
        raise _not_weights(file)
    return stored


def _not_weights(file: Path) -> ValueError:
    return ValueError(
        f"{file} is not a safetensors file or a weights-only checkpoint (it may be a pickle that holds "
        f"code, which is never run, or be truncated); re-save it with {_SAVE}"
    )


def _tensors(state: Any, file: Path) -> dict[str, Tensor]:
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{file} holds no state dict; re-save it with {_SAVE}")
    other = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(f"{file} holds more than weights ({_few(other)} are not tensors); re-save it with {_SAVE}")
    return dict(state)


def _without_prefix(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefix "net." of a Classifier, unless the network itself has such keys."""
    if state.keys() & own.keys():
        return state
    return {name.removeprefix("net."): tensor for name, tensor in state.items()}


def _check_names(state: Mapping[str, Tensor], own: Mapping[str, Tensor], file: Path) -> None:
    missing = [name for name in own if name not in state]
    extra = [name for name in state if name not in own]
    if missing or extra:
        raise ValueError(
            f"{file} does not fit the model: {len(missing)} of its {len(own)} weights are missing"
            f"{_shown(missing)}, {len(extra)} in the file are not expected{_shown(extra)}; "
            f"set the model to the one that was saved"
        )


def _check_shapes(state: Mapping[str, Tensor], own: Mapping[str, Tensor], file: Path) -> None:
    wrong = [name for name in own if own[name].shape != state[name].shape]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{file} does not fit the model: {name} is {tuple(state[name].shape)} in the file and "
            f"{tuple(own[name].shape)} in the model ({len(wrong)} of {len(own)} weights differ in shape); "
            f"set the model's widths, classes, channels and size to the saved ones"
        )


def _shown(names: list[str]) -> str:
    return f" ({_few(names)})" if names else ""


def _few(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
