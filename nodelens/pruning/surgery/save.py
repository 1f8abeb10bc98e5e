"""A pruned model on disk: weights as safetensors, the plan, and the config of the dense model."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn

from nodelens.pruning.removal_plan import RemovalPlan, digests
from nodelens.results.files import plain, write, write_json


def structure(model: nn.Module, stored: Collection[str] = ()) -> dict[str, Any]:
    """{name: [dtype, shape]} of the state dict; a model to load into must have the same names and shapes.

    stored: names of tensors that are listed, too, if they are buffers outside the state dict; slicing moves those into it.
    """
    tensors = {name: t for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    tensors |= {name: t for name, t in unsaved_buffers(model).items() if name in stored}
    return {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}


def origin_of(model: nn.Module) -> dict[str, Any]:
    """What the dense model can be built from: class and config of a transformers model, else the name of the class alone."""
    kind = type(model)
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict") or all(base.__name__ != "PreTrainedModel" for base in kind.__mro__):
        return {"class": f"{kind.__module__}.{kind.__qualname__}"}
    generation: Any = getattr(model, "generation_config", None)
    return {
        "transformers": kind.__name__,
        "config": {name: value for name, value in plain(config.to_dict()).items() if name != "_name_or_path"},
        "attention": getattr(config, "_attn_implementation", None),
        "experts": getattr(config, "_experts_implementation", None),
        "generation": None if generation is None else plain(generation.to_dict()),
    }


def save_pruned(pruned: Any, folder: Path) -> Path:
    """Writes ``model.safetensors``, ``config.json`` and, last, ``plan.json``: a folder with a plan is complete."""
    model: nn.Module = pruned.model
    if other := [name for name, value in model.state_dict().items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(
            f"{type(model).__name__} stores more than tensors ({other[0]}), which safetensors cannot hold: keep it with "
            "torch.save(pruned.model.state_dict(), file)"
        )
    write(folder / "model.safetensors", lambda path: save_model(model, str(path)))
    write_json(folder / "config.json", pruned.origin)
    plan: RemovalPlan = pruned.plan
    more = {"dense": pruned.dense, "kept": structure(model), "numbers": pruned.numbers, "apply": pruned.apply}
    more["buffers"] = {name: str(b.dtype).removeprefix("torch.") for name, b in unsaved_buffers(model).items()}
    more["config"] = digests(plain(pruned.origin))
    plan.save(folder / "plan.json", **more)
    return folder


def unsaved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that are not in the state dict, because they are computed from the config."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}
