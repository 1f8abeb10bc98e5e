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

from nodelens.network.sharded import load_state
from nodelens.results.files import checked

from .foreign import check_size, check_tensors

_WRAPPERS = ("net", "model", "module", "_orig_mod")  # of Lightning modules, of parallel wrappers, of torch.compile
_IN_FOLDER = ("model.safetensors", "checkpoints/best.ckpt", "best.ckpt")
_EXTRA = "_extra_state"  # what modules store besides tensors
_SAVE = "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
# errors of torch's restricted unpickler on bytes that are not a checkpoint: they are read as instructions until one fails
_UNREADABLE = (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, ValueError, TypeError, AttributeError)


def load_weights(net: nn.Module, path: str | Path) -> dict[str, Any] | None:
    """Copy stored weights into `net`; returns the config stored with them ("nodelens_config"), or None.

    path: a `.safetensors` file, a torch file with a plain state dict or a Lightning checkpoint ("state_dict"), or a folder as
    for `find_weights`. Names may have the prefixes `net.`, `model.`, `module.` and `_orig_mod.` of wrappers, nested in any way. No
    code in the file is run.
    Raises: FileNotFoundError if there is no file; ValueError if it holds no weights, or weights that do not fit. On an
    error, `net` is unchanged.
    """
    file = find_weights(path)
    stored = _read(file)
    config = stored.get("nodelens_config")
    own, found = net.state_dict(), stored.get("state_dict", stored)
    if isinstance(found, Mapping):
        check_tensors(found, file)
    state = _named_as(_state(found, file), own)
    _check_names(state, own, file)
    _check_shapes(state, own, file)
    check_tensors(state, file, {name: tensor for name, tensor in own.items() if isinstance(tensor, Tensor)})
    load_state(net, state)
    return config if isinstance(config, dict) else None


def training_state(path: str | Path) -> bool:
    """Whether a file is a Lightning checkpoint that training can resume from. Raises the errors of load_weights."""
    return {"state_dict", "optimizer_states", "pytorch-lightning_version"} <= _read(find_weights(path)).keys()


def find_weights(path: str | Path) -> Path:
    """The file with the weights: the file itself, in a folder model.safetensors, else the best checkpoint of a training run.

    Raises FileNotFoundError if there is none.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        inside = [file / name for name in _IN_FOLDER]
        file = next((each for each in inside if each.is_file()), file)
    if not file.is_file():
        raise FileNotFoundError(
            f"no weights at {file.resolve()}; give a .safetensors file, a checkpoint, a folder that holds model.safetensors, "
            "or the folder of a training run"
        )
    return file.resolve()


def _read(file: Path) -> Mapping[str, Any]:
    check_size(checked(file))
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


def _state(state: Any, file: Path) -> dict[str, Any]:
    """Names and values, which are tensors or the extra state of a module (``get_extra_state``)."""
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{file} holds no state dict; re-save it with {_SAVE}")
    other = [str(name) for name, value in state.items() if not isinstance(value, Tensor) and not str(name).endswith(_EXTRA)]
    if other:
        raise ValueError(f"{file} holds more than weights ({_few(other)} are not tensors); re-save it with {_SAVE}")
    return {str(name): value for name, value in state.items()}


def _named_as(state: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The state under the network's own names, without the names of wrappers in front and of ``torch.compile`` anywhere."""
    if state.keys() == own.keys():
        return state
    names = {_uncompiled(name): name for name in own}
    found = {_uncompiled(name): value for name, value in state.items()}
    while not found.keys() & names.keys():
        heads = {name.partition(".")[0] for name in found}
        if not heads & {*_WRAPPERS}:
            break
        found = {name.partition(".")[2] if name.partition(".")[0] in _WRAPPERS else name: value for name, value in found.items()}
    return {names.get(name, name): value for name, value in found.items()}


def _uncompiled(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _check_names(state: Mapping[str, Any], own: Mapping[str, Any], file: Path) -> None:
    missing = [name for name in own if name not in state]
    extra = [name for name in state if name not in own]
    if missing or extra:
        raise ValueError(
            f"{file} does not fit the model: {len(missing)} of its {len(own)} weights are missing"
            f"{_shown(missing)}, {len(extra)} in the file are not expected{_shown(extra)}; "
            f"set the model to the one that was saved"
        )


def _check_shapes(state: Mapping[str, Any], own: Mapping[str, Any], file: Path) -> None:
    tensors = [name for name in own if isinstance(own[name], Tensor) and isinstance(state[name], Tensor)]
    wrong = [name for name in tensors if own[name].shape != state[name].shape]
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
