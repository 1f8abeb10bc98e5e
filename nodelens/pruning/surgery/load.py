"""Loads a saved pruned model: the dense model's shapes, resized as the plan says, and the weights of the file."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from nodelens.messages import check_folder, shown
from nodelens.network.hooks import parameter_limit
from nodelens.network.open_attention import keep_open
from nodelens.pruning.groups.whole_experts import COUNTS

from .saved import SavedModel
from .slice import replace_tensor, set_count, update_sizes
from .structure import structure, unsaved_buffers

_BUILDERS = (  # whose arguments are numbers, and names of registered networks
    *("nodelens.models.mlp", "nodelens.models.cnn"),
    *("nodelens.models.torchvision_model", "nodelens.models.timm_model"),
)
_COUNTS = {  # attributes that a plan may set
    *("num_heads", "num_attention_heads", "n_heads", "num_key_value_heads", "num_kv_heads"),
    *("embed_dim", "all_head_size", "split_size", "inner_dim"),
    *COUNTS,  # numbers of experts
    *("intermediate_dim", "intermediate_size", "expert_dim", "groups", "num_features", "num_channels"),
}
_ORIGIN = {"class": str, "transformers": str, "attention": str, "experts": str, "config": dict, "generation": dict, "net": dict}
_KINDS = {str: "string", dict: "dictionary"}
_BUFFERS = 1 << 28  # bytes that buffers which are not stored may take beyond the size of the weights
_DENSER = 1000  # times the bytes of the file that a dense model may have
_COUNTED = ("layer", "label", "expert", "head", "block", "depth", "stage")  # words in options that say how many parts are built


def load_pruned(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The pruned model of a folder, in eval mode: a dense model is resized as the plan says, then the weights are loaded strictly.

    model: a dense model to resize and load into (its weights do not matter); required unless the folder says how to build it,
    which it does for models of transformers and of ``nodelens.models``. The dense model that is built has shapes only: memory is
    taken for the weights of the file. No code in the files is run, and no kernel of the hub.

    Raises FileNotFoundError for a missing file; ValueError, with file and field, for a different model than the one that was pruned
    and for files that are damaged, were changed, or do not fit each other. A given model is then as it was.
    """
    check_folder("nl.load_pruned", folder)
    saved = SavedModel.read(Path(folder))
    net = _dense_model(saved) if model is None else model
    _check_structure(net, saved)
    _check_tied(net, saved)
    for path, numbers in saved.numbers.items():
        for attribute, value in numbers.items():
            _check_count(net, path, attribute, value, saved)
    for path, module in net.named_modules():
        own = {name for name in module._non_persistent_buffers_set if f"{path}.{name}".lstrip(".") in saved.dense}
        module._non_persistent_buffers_set -= own
    _fill(net, saved)
    for name, buffer in unsaved_buffers(net).items():  # such as rotary frequencies, in the dtype of the saved model
        path, _, tensor = name.rpartition(".")
        setattr(net.get_submodule(path), tensor, buffer.to(saved.buffers.get(name, buffer.dtype)))
    for path, numbers in saved.numbers.items():
        for attribute, value in numbers.items():
            set_count(net.get_submodule(path), attribute, value)
    keep_open(net, {name.rpartition(".")[0] for name, planned in saved.kept.items() if saved.dense.get(name) != planned})
    return net.eval()


def _dense_model(saved: SavedModel) -> nn.Module:
    """The dense model on the meta device, with real values in the buffers that are not stored."""
    where, origin = str(saved.origin_file), saved.origin
    for field, kind in _ORIGIN.items():
        if not isinstance(origin.get(field), kind) and origin.get(field) is not None:
            raise ValueError(f"{where}: {field} is {shown(origin[field])}; it must be a {_KINDS[kind]}")
    if "transformers" not in origin:
        target = (origin.get("net") or {}).get("_target_", origin.get("class"))
        if target not in _BUILDERS:
            needed = f"give a model to load into, load_pruned(folder, model={str(target).rpartition('.')[2]}(...))"
            raise ValueError(f"{saved.folder} holds a {str(target)[:200]}: {needed}")
    _check_sizes(origin, saved, where)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), parameter_limit(2 * len(saved.dense) + 100):
            net = _transformers_model(origin, where) if "transformers" in origin else _small_model(origin)
    except Exception as error:  # whatever a constructor raises for values that do not fit
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(text if where in text else f"{where}: the model cannot be built: {text[:300]}") from error
    _check_structure(net, saved)
    _compute_buffers(net, saved, where)
    return net


def _small_model(origin: Mapping[str, Any]) -> nn.Module:
    from nodelens import models

    arguments = {name: value for name, value in origin["net"].items() if name != "pretrained"}  # the folder has the weights
    return getattr(models, arguments.pop("_target_").rpartition(".")[2])(**arguments)


def _transformers_model(origin: Mapping[str, Any], where: str) -> nn.Module:
    import transformers

    from nodelens.models import hf
    from nodelens.models.trusted import check_implementations

    name = origin["transformers"]
    kind = getattr(hf, name, None) or getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"{where}: transformers is {shown(name)}, which is no model of transformers {transformers.__version__}")
    try:
        config = kind.config_class.from_dict(dict(origin.get("config") or {}))  # type: ignore[union-attr]
    except Exception as error:  # configs check themselves in many ways
        why = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{where}: transformers {transformers.__version__} refuses the config of {name}: {why}; "
            f"give a dense model to load into, load_pruned(folder, model={name}(...))"
        ) from error
    for field in ("attention", "experts"):
        if origin.get(field) is not None:
            setattr(config, {"attention": "_attn_implementation", "experts": "_experts_implementation"}[field], origin[field])
    check_implementations(config, where, kind)
    model = kind(config)
    if origin.get("generation") is not None:
        model.generation_config = transformers.GenerationConfig.from_dict(origin["generation"])
    return model


def _check_sizes(value: Any, saved: SavedModel, where: str, key: str = "") -> None:
    """Raises ValueError for a number of layers, labels or experts beyond any size in the plan, before lists as long are made."""
    most = max(10_000, len(saved.dense), *(n for _, shape in saved.dense.values() for n in shape))
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        _check_sizes(inner, saved, where, f"{key}.{name}" if key else str(name))
    if isinstance(value, int) and abs(value) > most and any(word in key.lower() for word in _COUNTED):
        raise ValueError(f"{where}: {key} is {shown(value)}; the largest number in the plan is {most}")


def _compute_buffers(net: nn.Module, saved: SavedModel, where: str) -> None:
    """Gives the buffers that are not stored their values, which the model computes from its config.

    Models of transformers can compute them alone; of others the dense model is built once more, on the CPU.
    """
    buffers = unsaved_buffers(net)
    size = sum(buffer.numel() * buffer.element_size() for buffer in buffers.values())
    most = _BUFFERS + (saved.folder / "model.safetensors").stat().st_size
    if size > most:
        largest = max(buffers, key=lambda name: buffers[name].numel())
        raise ValueError(
            f"{where}: the buffer {largest} has the shape {list(buffers[largest].shape)}: {size} bytes, at most {most}"
        )
    if buffers and "transformers" not in saved.origin:
        _copy_buffers(net, saved, where)
        return
    initialize: dict[str, None] = {}  # the modules that hold buffers, and those around them, some of which fill them
    for name, buffer in buffers.items():
        path, _, tensor = name.rpartition(".")
        setattr(net.get_submodule(path), tensor, torch.zeros_like(buffer, device="cpu"))
        parts = path.split(".")
        initialize |= dict.fromkeys(".".join(parts[:k]) for k in range(len(parts), -1, -1))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for path in sorted(initialize, key=lambda path: len(path.split(".")) if path else 0, reverse=True):  # outer ones last
            net._init_weights(net.get_submodule(path))  # type: ignore[operator]


def _copy_buffers(net: nn.Module, saved: SavedModel, where: str) -> None:
    """The buffers of a dense model that is built with its weights. Raises ValueError if these take far more than the file has."""
    size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in saved.dense.values())
    most = _BUFFERS + _DENSER * (saved.folder / "model.safetensors").stat().st_size
    if size > most:
        raise ValueError(
            f"{where}: the dense model takes {size} bytes, at most {most} for this file: give it, load_pruned(folder, model=...)"
        )
    with torch.random.fork_rng(devices=[]):
        built = unsaved_buffers(_small_model(saved.origin))
    for name, buffer in built.items():
        path, _, tensor = name.rpartition(".")
        setattr(net.get_submodule(path), tensor, buffer)


def _check_structure(net: nn.Module, saved: SavedModel) -> None:
    """Raises ValueError if names or shapes differ; dtypes may, because the stored ones are used."""
    model = structure(net, saved.dense)
    for name in dict.fromkeys([*saved.dense, *model]):
        mine = model[name][1] if name in model else None
        planned = saved.dense[name][1] if name in saved.dense else None
        if mine != planned:
            here, there = (side or ("a number" if side == [] else "absent") for side in (mine, planned))
            raise ValueError(
                f"{type(net).__name__} is not the dense model of {saved.folder}: {name} is {here} here and {there} in the plan"
            )
    unknown = next((name for name in saved.buffers if name not in unsaved_buffers(net)), None)
    if unknown is not None:
        raise ValueError(f"{saved.folder / 'plan.json'}: buffers has {shown(unknown)}, which {type(net).__name__} does not have")


def _check_tied(net: nn.Module, saved: SavedModel) -> None:
    """Raises ValueError for a tensor of the plan that is in the file under none of its names."""
    names = _aliases(net)
    for name in saved.kept:
        every = names.get(name, [name])
        if not any(alias in saved.stored for alias in every):
            raise ValueError(f"{saved.folder}: {' or '.join(every)} is in plan.json and not in model.safetensors")


def _aliases(net: nn.Module) -> dict[str, list[str]]:
    """{name: all names of the same tensor}."""
    every: dict[int, list[str]] = {}
    present = net.state_dict(keep_vars=True)
    for name, tensor in present.items():
        every.setdefault(id(tensor), []).append(name)
    return {name: every[id(tensor)] for name, tensor in present.items()}


def _fill(net: nn.Module, saved: SavedModel) -> None:
    """Gives every tensor the values, shape and dtype it is stored with; tensors with several names stay one tensor."""
    present, aliases, changed = dict(net.state_dict(keep_vars=True)), _aliases(net), set()
    done: dict[int, torch.Tensor] = {}
    with safe_open(saved.folder / "model.safetensors", "pt") as file, torch.no_grad():
        for name in saved.kept:
            path, _, tensor = name.rpartition(".")
            module, old = net.get_submodule(path), present.get(name)
            if old is not None and id(old) in done:
                setattr(module, tensor, done[id(old)])
            else:
                source = next(alias for alias in aliases.get(name, [name]) if alias in saved.stored)
                _put(module, tensor, old, file.get_tensor(source))
                done |= {} if old is None else {id(old): getattr(module, tensor)}
            changed.add(path)
    for path in changed:
        update_sizes(net, path)


def _put(module: nn.Module, name: str, old: torch.Tensor | None, value: torch.Tensor) -> None:
    """Writes a stored tensor where the model has one of its shape and dtype, else in its place, on the same device."""
    if old is None:  # a bias that compensation added
        weight: Any = module.weight
        module.bias = nn.Parameter(value.to("cpu" if weight.is_meta else weight.device, copy=True))
    elif not old.is_meta and old.shape == value.shape and old.dtype == value.dtype:
        old.copy_(value)
    else:
        replace_tensor(module, name, value.to("cpu" if old.is_meta else old.device, copy=True))


def _check_count(net: nn.Module, path: str, attribute: str, value: int, saved: SavedModel) -> None:
    """Raises ValueError for anything but a count of the model that becomes smaller."""
    field = f"{saved.folder / 'plan.json'}: numbers.{path}.{attribute}"
    try:
        holder: Any = net.get_submodule(path)
    except AttributeError:
        holder = None
    if attribute.removeprefix("config.") not in _COUNTS and type(vars(holder or net).get(attribute)) is not int:
        raise ValueError(f"{field} is {value}: a plan can set only counts, such as num_heads")
    for part in attribute.split("."):
        holder = getattr(holder, part, None)
    if type(holder) is not int or value > holder:
        raise ValueError(f"{field} is {value}; the dense model has {shown(holder)} there, and pruning makes no count larger")
