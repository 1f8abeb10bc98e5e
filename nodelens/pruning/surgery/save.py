"""A pruned model on disk: weights as safetensors, the plan, and what the dense model is built from."""

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

from .slice import refit, replace_tensor, set_number

FILES = ("model.safetensors", "plan.json", "config.json")
_BUILDERS = ("nodelens.models.mlp", "nodelens.models.cnn")  # of numbers alone
_NUMBERS = {  # that a plan may set
    *("num_heads", "num_attention_heads", "n_heads", "num_key_value_heads", "num_kv_heads"),
    *("embed_dim", "all_head_size", "split_size", "inner_dim"),
    *COUNTS,  # of experts
    *("intermediate_dim", "intermediate_size", "expert_dim", "groups", "num_features", "num_channels"),
}


def structure(model: nn.Module) -> dict[str, Any]:
    """{name: [dtype, shape]} of the state dict, in which a skeleton has to agree."""
    return {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in model.state_dict().items()}


def origin_of(model: nn.Module) -> dict[str, Any]:
    """What a dense model can be built from: of a model of transformers its class and config, else the class's name alone."""
    kind = type(model)
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict") or not hasattr(kind, "from_pretrained"):
        return {"class": f"{kind.__module__}.{kind.__qualname__}"}
    generation: Any = getattr(model, "generation_config", None)
    return {
        "transformers": kind.__name__,
        "config": plain(config.to_dict()),
        "attention": getattr(config, "_attn_implementation", None),
        "experts": getattr(config, "_experts_implementation", None),
        "generation": None if generation is None else plain(generation.to_dict()),
    }


def save_pruned(pruned: Any, folder: Path) -> Path:
    """Writes ``model.safetensors``, ``plan.json`` and ``config.json``, the plan last: it says that all is there."""
    model: nn.Module = pruned.model
    write(folder / "model.safetensors", lambda path: save_model(model, str(path)))
    write_json(folder / "config.json", pruned.origin)
    plan: RemovalPlan = pruned.plan
    more = {"dense": pruned.dense, "kept": structure(model), "numbers": pruned.numbers, "apply": pruned.apply}
    more["buffers"] = {name: str(b.dtype).removeprefix("torch.") for name, b in _unsaved(model).items()}
    plan.save(folder / "plan.json", **more)
    return folder


def load_pruned(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The pruned model of a folder, in eval mode: the dense skeleton made smaller as the plan says, then loaded strictly.

    model: the dense skeleton (its weights do not matter, and it becomes the result); needed where the folder does not tell how
    it is built: models of transformers and of ``nodelens.models`` are. Nothing in the files is run. Raises FileNotFoundError for
    a file that is missing, ValueError for another model than the one that was pruned, a changed plan, or weights that do not fit.
    """
    folder = Path(folder)
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no pruned model: {name} is missing")
    found = read_json(folder / "plan.json")
    plan = RemovalPlan.read(found, str(folder / "plan.json"))
    with torch.random.fork_rng(devices=[]):
        skeleton = _skeleton(read_json(folder / "config.json"), folder) if model is None else model
    _agree(structure(skeleton), found.get("dense") or {}, f"{type(skeleton).__name__} is not the model that {folder} was made of")
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            stored = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise ValueError(f"{folder / 'model.safetensors'} cannot be read: {error}") from error
    kept: dict[str, Any] = found.get("kept") or {}
    strange = [name for name, shape in stored.items() if kept.get(name, [None, None])[1] != shape]
    if strange:
        name = strange[0]
        raise ValueError(
            f"{folder}: {name} has the shape {stored[name]}, the plan says {kept.get(name, [0, 'that it is not there'])[1]}"
        )
    _resize(skeleton, kept, set(plan.about.get("added_bias") or ()))
    for name, buffer in _unsaved(skeleton).items():  # rotary frequencies, cast where the model was
        path, _, tensor = name.rpartition(".")
        setattr(skeleton.get_submodule(path), tensor, buffer.to(_dtype((found.get("buffers") or {}).get(name, buffer.dtype))))
    for path, numbers in (found.get("numbers") or {}).items():
        for attribute, value in numbers.items():
            _set(skeleton, path, attribute, value)
    try:
        load_model(skeleton, folder / "model.safetensors", strict=True)
    except RuntimeError as error:
        raise ValueError(f"{folder}: the weights do not fit: {' '.join(str(error).split())[:300]}") from error
    return skeleton.eval()


def _skeleton(origin: Mapping[str, Any], folder: Path) -> nn.Module:
    """The dense model, with any weights."""
    if "transformers" in origin:
        return _of_transformers(origin, folder)
    given = dict(origin.get("net") or {})
    made = given.pop("_target_", origin.get("class"))
    if made in _BUILDERS:
        from nodelens import models

        return getattr(models, made.rpartition(".")[2])(**given)
    raise ValueError(
        f"{folder} holds a {made}: give one to load into, load_pruned(folder, model={str(made).rpartition('.')[2]}(...))"
    )


def _of_transformers(origin: Mapping[str, Any], folder: Path) -> nn.Module:
    import transformers

    from nodelens.models import hf

    name = str(origin["transformers"])
    kind = getattr(hf, name, None) or getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"{folder}: {name!r} is no model of transformers {transformers.__version__}")
    config = kind.config_class.from_dict(dict(origin["config"]))  # type: ignore[union-attr]
    for field in ("attention", "experts"):
        if origin.get(field) is not None:
            setattr(config, {"attention": "_attn_implementation", "experts": "_experts_implementation"}[field], origin[field])
    model = kind(config)
    if origin.get("generation") is not None:
        model.generation_config = transformers.GenerationConfig.from_dict(origin["generation"])
    return model


def _agree(here: Mapping[str, Any], there: Mapping[str, Any], what: str) -> None:
    """Raises ValueError where names or shapes differ; the dtype may, it becomes the stored one's."""
    for name in dict.fromkeys([*there, *here]):
        mine, theirs = (side[name][1] if name in side else None for side in (here, there))
        if mine != theirs:
            raise ValueError(f"{what}: {name} is {mine or 'not there'} here and {theirs or 'not there'} in the plan")


def _resize(model: nn.Module, kept: Mapping[str, Any], grown: set[str]) -> None:
    """Gives every tensor the shape and dtype it is stored with."""
    here, changed = dict(model.state_dict(keep_vars=True)), set()
    same: dict[int, torch.Tensor] = {}  # tied tensors stay one
    for name, (dtype, shape) in kept.items():
        path, _, tensor = name.rpartition(".")
        module = model.get_submodule(path)
        if name not in here:
            if tensor != "bias" or path not in grown:
                raise ValueError(f"the plan has a tensor {name} that {type(model).__name__} has not")
            module.bias = nn.Parameter(torch.zeros(shape, dtype=_dtype(dtype)))
        elif list(here[name].shape) != shape or str(here[name].dtype) != f"torch.{dtype}":
            old = here[name]
            if id(old) in same:
                setattr(module, tensor, same[id(old)])
            else:
                replace_tensor(module, tensor, torch.zeros(shape, dtype=_dtype(dtype)))
                same[id(old)] = getattr(module, tensor)
            changed.add(path)
    for path in changed:
        refit(model.get_submodule(path))


def _unsaved(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that are not in the state dict: computed from the config."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


def _dtype(name: Any) -> torch.dtype:
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"the plan names the dtype {name!r}, which torch does not have")
    return found


def _set(model: nn.Module, path: str, attribute: str, value: Any) -> None:
    if attribute.removeprefix("config.") not in _NUMBERS or isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"the plan sets {path}.{attribute} to {value!r}: it sets counts alone, such as num_heads")
    set_number(model.get_submodule(path), attribute, value)
