"""What a model is built from, and the names, dtypes and shapes of its tensors, as they are stored with a pruned model."""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from nodelens.results.files import plain


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


def unsaved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that are not in the state dict, because they are computed from the config."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}
