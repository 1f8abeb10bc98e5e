"""A pruned model on disk: weights as safetensors, the plan, and the config of the dense model."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from nodelens.pruning.groups.whole_experts import COUNTS
from nodelens.pruning.removal_plan import RemovalPlan
from nodelens.results.files import plain, read_json, write, write_json

from .slice import replace_tensor, set_count, update_sizes

FILES = ("model.safetensors", "plan.json", "config.json")
_FLOAT = "__float__"
_BUILDERS = ("nodelens.models.mlp", "nodelens.models.cnn")  # whose arguments are numbers only
_COUNTS = {  # attributes that a plan may set
    *("num_heads", "num_attention_heads", "n_heads", "num_key_value_heads", "num_kv_heads"),
    *("embed_dim", "all_head_size", "split_size", "inner_dim"),
    *COUNTS,  # numbers of experts
    *("intermediate_dim", "intermediate_size", "expert_dim", "groups", "num_features", "num_channels"),
}


def structure(model: nn.Module) -> dict[str, Any]:
    """{name: [dtype, shape]} of the state dict; a model to load into must have the same names and shapes."""
    return {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in model.state_dict().items()}


def origin_of(model: nn.Module) -> dict[str, Any]:
    """What the dense model can be built from: class and config of a transformers model, else the name of the class alone."""
    kind = type(model)
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict") or all(base.__name__ != "PreTrainedModel" for base in kind.__mro__):
        return {"class": f"{kind.__module__}.{kind.__qualname__}"}
    generation: Any = getattr(model, "generation_config", None)
    return {
        "transformers": kind.__name__,
        "config": plain(_tagged(config.to_dict())),
        "attention": getattr(config, "_attn_implementation", None),
        "experts": getattr(config, "_experts_implementation", None),
        "generation": None if generation is None else plain(_tagged(generation.to_dict())),
    }


def save_pruned(pruned: Any, folder: Path) -> Path:
    """Writes ``model.safetensors``, ``config.json`` and, last, ``plan.json``: a folder with a plan is complete."""
    model: nn.Module = pruned.model
    write(folder / "model.safetensors", lambda path: save_model(model, str(path)))
    write_json(folder / "config.json", pruned.origin)
    plan: RemovalPlan = pruned.plan
    more = {"dense": pruned.dense, "kept": structure(model), "numbers": pruned.numbers, "apply": pruned.apply}
    more["buffers"] = {name: str(b.dtype).removeprefix("torch.") for name, b in _unsaved(model).items()}
    plan.save(folder / "plan.json", **more)
    return folder


def load_pruned(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The pruned model of a folder, in eval mode: a dense model is resized as the plan says, then the weights are loaded strictly.

    model: a dense model to resize and load into (its weights do not matter); required unless the folder says how to build it,
    which it does for models of transformers and of ``nodelens.models``. No code in the files is run. Raises FileNotFoundError for
    a missing file, ValueError for a different model than the one that was pruned, a modified plan, or weights that do not fit.
    """
    folder = Path(folder)
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no pruned model: {name} is missing")
    content = read_json(folder / "plan.json")
    plan = RemovalPlan.read(content, str(folder / "plan.json"))
    with torch.random.fork_rng(devices=[]):
        net = _dense_model(read_json(folder / "config.json"), folder) if model is None else model
    _check_structure(structure(net), content.get("dense") or {}, f"{type(net).__name__} is not the dense model of {folder}")
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            stored = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise ValueError(f"{folder / 'model.safetensors'} cannot be read: {error}") from error
    kept: dict[str, Any] = content.get("kept") or {}
    different = [name for name, shape in stored.items() if kept.get(name, [None, None])[1] != shape]
    if different:
        name = different[0]
        planned = f"has it with shape {kept[name][1]}" if name in kept else "does not have it"
        raise ValueError(f"{folder}: {name} has the shape {stored[name]} in model.safetensors, the plan {planned}")
    _resize(net, kept, set(plan.about.get("added_bias") or ()))
    for name, buffer in _unsaved(net).items():  # such as rotary frequencies, in the dtype of the saved model
        path, _, tensor = name.rpartition(".")
        setattr(net.get_submodule(path), tensor, buffer.to(_dtype((content.get("buffers") or {}).get(name, buffer.dtype))))
    for path, numbers in (content.get("numbers") or {}).items():
        for attribute, value in numbers.items():
            _set(net, path, attribute, value)
    try:
        load_model(net, folder / "model.safetensors", strict=True)
    except RuntimeError as error:
        raise ValueError(f"{folder}: the weights do not fit: {' '.join(str(error).split())[:300]}") from error
    return net.eval()


def _dense_model(origin: Mapping[str, Any], folder: Path) -> nn.Module:
    """The dense model, with arbitrary weights."""
    if "transformers" in origin:
        return _transformers_model(origin, folder)
    arguments = dict(origin.get("net") or {})
    target = arguments.pop("_target_", origin.get("class"))
    if target in _BUILDERS:
        from nodelens import models

        return getattr(models, target.rpartition(".")[2])(**arguments)
    raise ValueError(
        f"{folder} holds a {target}: give a model to load into, load_pruned(folder, model={str(target).rpartition('.')[2]}(...))"
    )


def _transformers_model(origin: Mapping[str, Any], folder: Path) -> nn.Module:
    import transformers

    from nodelens.models import hf

    name = str(origin["transformers"])
    kind = getattr(hf, name, None) or getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"{folder}: {name!r} is no model of transformers {transformers.__version__}")
    try:
        config = kind.config_class.from_dict(_untagged(origin["config"]))  # type: ignore[union-attr]
    except Exception as error:  # configs check themselves in many ways
        why = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{folder}: transformers {transformers.__version__} refuses the config of {name}: {why}; "
            f"give a dense model to load into, load_pruned(folder, model={name}(...))"
        ) from error
    for field in ("attention", "experts"):
        if origin.get(field) is not None:
            setattr(config, {"attention": "_attn_implementation", "experts": "_experts_implementation"}[field], origin[field])
    model = kind(config)
    if origin.get("generation") is not None:
        model.generation_config = transformers.GenerationConfig.from_dict(_untagged(origin["generation"]))
    return model


def _tagged(value: Any) -> Any:
    """A config's value with the numbers that JSON lacks as {"__float__": "inf"}, such as the upper limit of a time step."""
    if isinstance(value, dict):
        return {key: _tagged(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tagged(each) for each in value]
    return {_FLOAT: repr(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _untagged(value: Any) -> Any:
    if isinstance(value, dict):
        tagged = value.keys() == {_FLOAT} and value[_FLOAT] in ("inf", "-inf", "nan")
        return float(value[_FLOAT]) if tagged else {key: _untagged(each) for key, each in value.items()}
    return [_untagged(each) for each in value] if isinstance(value, list) else value


def _check_structure(model: Mapping[str, Any], plan: Mapping[str, Any], what: str) -> None:
    """Raises ValueError if names or shapes differ; dtypes may, because the stored ones are used."""
    for name in dict.fromkeys([*plan, *model]):
        mine, planned = (side[name][1] if name in side else None for side in (model, plan))
        if mine != planned:
            raise ValueError(f"{what}: {name} is {mine or 'absent'} here and {planned or 'absent'} in the plan")


def _resize(model: nn.Module, kept: Mapping[str, Any], added_bias: set[str]) -> None:
    """Gives every tensor the shape and dtype it is stored with."""
    present, changed = dict(model.state_dict(keep_vars=True)), set()
    tied: dict[int, torch.Tensor] = {}  # tensors with several names stay one tensor
    for name, (dtype, shape) in kept.items():
        path, _, tensor = name.rpartition(".")
        module = model.get_submodule(path)
        if name not in present:
            if tensor != "bias" or path not in added_bias:
                raise ValueError(f"the plan has a tensor {name} that {type(model).__name__} does not have")
            module.bias = nn.Parameter(torch.zeros(shape, dtype=_dtype(dtype)))
        elif list(present[name].shape) != shape or str(present[name].dtype) != f"torch.{dtype}":
            old = present[name]
            if id(old) in tied:
                setattr(module, tensor, tied[id(old)])
            else:
                replace_tensor(module, tensor, torch.zeros(shape, dtype=_dtype(dtype)))
                tied[id(old)] = getattr(module, tensor)
            changed.add(path)
    for path in changed:
        update_sizes(model.get_submodule(path))


def _unsaved(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that are not in the state dict, because they are computed from the config."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


def _dtype(name: Any) -> torch.dtype:
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"the plan names the dtype {name!r}, which torch does not have")
    return dtype


def _set(model: nn.Module, path: str, attribute: str, value: Any) -> None:
    if attribute.removeprefix("config.") not in _COUNTS or isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"the plan sets {path}.{attribute} to {value!r}: a plan can set only counts, such as num_heads")
    set_count(model.get_submodule(path), attribute, value)
