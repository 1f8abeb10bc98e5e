"""The modelling file of a pruned model whose widths no config can say: it resizes the dense model as config.json says."""

from collections.abc import Mapping
from typing import Any

from torch import nn

FILE = "modeling_pruned.py"
_TEXT = '''"""{kind} of transformers with the widths that pruning left; they stand in config.json under "pruned".

Needs torch and transformers. To open the folder with this file, pass trust_remote_code=True.
"""

import copy

import torch
from torch import nn
from transformers import {config}, {kind}


class Pruned{config}({config}):
    model_type = "{model_type}"


class Pruned{kind}({kind}):
    config_class = Pruned{config}

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        for name, shape in config.pruned["shapes"].items():
            path, _, tensor = name.rpartition(".")
            _resize(self.get_submodule(path), tensor, shape)
        for path, numbers in config.pruned["numbers"].items():
            for attribute, value in numbers.items():
                _set(self.get_submodule(path), attribute, value)


def _resize(module, name, shape):
    """Gives a tensor another shape, or adds it, and updates the sizes that a module stores. The values come from the file."""
    old = getattr(module, name)
    like = module.weight if old is None else old
    new = torch.zeros(shape, dtype=like.dtype, device=like.device)
    if isinstance(old, nn.Parameter) or old is None:
        new = nn.Parameter(new, requires_grad=like.requires_grad)
    setattr(module, name, new)
    if name == "weight" and isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif name == "weight" and type(module).__name__ == "Conv1D":
        module.nx, module.nf = shape
    elif name == "weight" and isinstance(module, nn.modules.conv._ConvNd):
        sizes = shape[1] * module.groups, shape[0]
        module.in_channels, module.out_channels = sizes[::-1] if module.transposed else sizes
    elif name == "weight" and hasattr(module, "normalized_shape"):
        module.normalized_shape = tuple(shape)
    elif name == "weight" and hasattr(module, "num_features"):
        module.num_features = shape[0]
    elif name == "weight" and isinstance(module, nn.GroupNorm):
        module.num_channels = shape[0]


def _set(module, attribute, value):
    """Sets a count of a module; of a config, in a copy of its own."""
    holder, _, field = attribute.rpartition(".")
    if not holder:
        setattr(module, field, value)
        return
    old = getattr(module, holder)
    new = copy.copy(old)
    setattr(new, field, value)
    for part in module.modules():
        if getattr(part, holder, None) is old:
            setattr(part, holder, new)
'''


def modelling_file(model: nn.Module) -> str:
    """The text of the file, for the class of a model of transformers."""
    config: Any = model.config
    return _TEXT.format(kind=type(model).__name__, config=type(config).__name__, model_type=model_type(config))


def model_type(config: Any) -> str:
    """The type that config.json names: one that transformers does not have, so that the file is needed."""
    return f"pruned_{config.model_type}"


def config_fields(
    model: nn.Module, dense: Mapping[str, Any], kept: Mapping[str, Any], numbers: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of config.json that belong to the file. dense, kept: {tensor: [dtype, shape]}."""
    config, kind = model.config, type(model).__name__
    stem = FILE.removesuffix(".py")
    shapes = {name: entry[1] for name, entry in kept.items() if name not in dense or dense[name][1] != entry[1]}
    return {
        "model_type": model_type(config),
        "architectures": [f"Pruned{kind}"],
        "auto_map": {
            "AutoConfig": f"{stem}.Pruned{type(config).__name__}",
            **dict.fromkeys(auto_classes(model), f"{stem}.Pruned{kind}"),
        },
        "pruned": {"shapes": shapes, "numbers": {path: dict(each) for path, each in numbers.items()}},
    }


def auto_classes(model: nn.Module) -> list[str]:
    """The classes of transformers, such as AutoModelForCausalLM, that open a model of this class."""
    from transformers.models.auto import modeling_auto

    found = []
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if mapping is not None and name.startswith("AutoModel"):
            kinds = mapping.get(type(model.config), None)
            found += [name] if type(model) in (kinds if isinstance(kinds, tuple) else (kinds,)) else []
    return found
