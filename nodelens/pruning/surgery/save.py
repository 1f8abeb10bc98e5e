"""A pruned model on disk: weights as safetensors, the plan, how the dense model is built, and a config for transformers."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from nodelens.pruning.hub.card import model_card
from nodelens.pruning.hub.files import hub_files
from nodelens.pruning.hub.modelling_file import FILE
from nodelens.pruning.removal_plan import RemovalPlan, digests
from nodelens.results.files import plain, write, write_json, write_text

from .saved import ORIGIN
from .structure import structure, unsaved_buffers


def save_pruned(pruned: Any, folder: Path, tokenizer: Any = None, sweep: Any = None) -> Path:
    """Writes weights, configs, a model card and, last, ``plan.json``: a folder with a plan is complete."""
    model: nn.Module = pruned.model
    if other := [name for name, value in model.state_dict().items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(
            f"{type(model).__name__} stores more than tensors ({other[0]}), which safetensors cannot hold: keep it with "
            "torch.save(pruned.model.state_dict(), file)"
        )
    files = hub_files(pruned)
    write(folder / "model.safetensors", lambda path: save_file(stored_tensors(model), str(path), {"format": "pt"}))
    write_json(folder / (ORIGIN if files else "config.json"), pruned.origin)
    for name, text in (files | {"README.md": model_card(pruned, FILE in files, bool(files), sweep)}).items():
        write_text(folder / name, text)
    if tokenizer is not None:
        _save_tokenizer(tokenizer, folder)
    plan: RemovalPlan = pruned.plan
    more = {"dense": pruned.dense, "kept": structure(model), "numbers": pruned.numbers, "apply": pruned.apply}
    more["buffers"] = {name: str(b.dtype).removeprefix("torch.") for name, b in unsaved_buffers(model).items()}
    more["config"] = digests(plain(pruned.origin))
    plan.save(folder / "plan.json", **more)
    return folder


def stored_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the state dict, each under one name: of tied ones, the name from which transformers ties the others."""
    tied: Mapping[str, Any] = getattr(model, "all_tied_weights_keys", None) or {}
    found: dict[tuple[Any, ...], str] = {}
    tensors = dict(model.state_dict())
    for name in sorted(tensors, key=lambda name: name in tied):
        tensor = tensors[name]
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        found.setdefault(key, name)
    kept = set(found.values())
    return {name: tensor.contiguous() for name, tensor in tensors.items() if name in kept}


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes the files of a tokenizer. Raises TypeError for one that cannot be saved."""
    if not hasattr(tokenizer, "save_pretrained"):
        raise TypeError(f"tokenizer is {type(tokenizer).__name__}; give one of transformers, as AutoTokenizer.from_pretrained does")
    with TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        for file in filter(Path.is_file, Path(place).iterdir()):
            write(folder / file.name, lambda path, file=file: shutil.copyfile(file, path))  # type: ignore[misc]
