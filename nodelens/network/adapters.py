"""Adapters of low rank (LoRA): two small layers beside a layer of the base model, which their wrapper holds as ``base_layer``."""

import re
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

from torch import Tensor, nn

Axis = tuple[str, str, int]  # the path of a module, the name of one of its tensors, and a dimension of it
MERGE = "merge the adapters first, model = model.merge_and_unload()"
_DOWN = re.compile(r"(^|\.)lora_(a|down)(\.|$)", re.IGNORECASE)
_PART = re.compile(r"(^|\.)lora_\w+(\.|$)", re.IGNORECASE)
_SIDES = ("lora_A", "lora_B")


class Adapter(NamedTuple):
    """An adapter of a layer: the layer from its input to the ranks, and the layer from the ranks to its output."""

    down: str  # paths below the wrapper, such as lora_A.default
    up: str
    biased: bool  # whether the second layer has a bias
    runs: bool  # an adapter that is merged, disabled or not the active one does not


def is_rank(module: str, tensor: str, dim: int, shape: tuple[int, ...]) -> bool:
    """Whether a dimension of a tensor is the rank of an adapter: the outputs of its first layer, by the names that LoRA uses.

    A factor without a layer of its own, as ``x @ lora_A @ lora_B`` has, may be stored in both ways: the rank is its shorter side.
    """
    if not _DOWN.search(f"{module}.{tensor}") or len(shape) < 2:
        return False
    return dim == (0 if tensor == "weight" or shape[0] <= shape[1] else 1)


def in_adapter(name: str) -> bool:
    """Whether the name of a parameter says that it belongs to an adapter of low rank."""
    return _PART.search(name) is not None


def has_adapters(model: nn.Module) -> bool:
    """Whether a layer of a model is wrapped by an adapter of any kind."""
    return any("base_layer" in module._modules for module in model.modules())


def adapters_of(wrapper: nn.Module) -> list[Adapter]:
    """The adapters of low rank beside the base layer of a wrapper. Raises ValueError for any other kind of adapter."""
    inside: dict[str, Any] = {name: dict(part.named_children()) for name, part in wrapper.named_children() if name in _SIDES}
    downs, ups = (inside.get(side, {}) for side in _SIDES)
    layers = [*downs.values(), *ups.values()]
    own = {f"{side}.{name}" for side, parts in inside.items() for name in parts} | {"base_layer"}
    others = [n for n, p in wrapper.named_parameters() if not any(n.startswith(f"{o}.") for o in own) and p.numel()]
    if others or downs.keys() != ups.keys() or not all(isinstance(part, (nn.Linear, nn.modules.conv._ConvNd)) for part in layers):
        what = (others or [type(wrapper).__name__])[0]
        raise ValueError(f"has an adapter that cannot be sliced, {what}: {MERGE}")
    idle = bool(getattr(wrapper, "merged", False) or getattr(wrapper, "disable_adapters", False))
    active = getattr(wrapper, "active_adapters", list(downs))
    return [
        Adapter(f"lora_A.{name}", f"lora_B.{name}", up.bias is not None, not idle and name in active) for name, up in ups.items()
    ]


def idle_axes(model: nn.Module) -> Iterator[tuple[Axis, Axis]]:
    """Dimensions of parameters that may not run, each with that of the layer that runs in their place and has the same width.

    These are adapters that are merged or not active, and the copies of a module that PEFT saves with them (``modules_to_save``).
    """
    for path, module in model.named_modules():
        parts = dict(module.named_children())
        if "base_layer" in parts:
            base = f"{path}.base_layer".lstrip(".")
            for side, dim in zip(_SIDES, (1, 0), strict=True):
                for name, part in parts[side].named_children() if side in parts else ():
                    at = f"{path}.{side}.{name}".lstrip(".")
                    yield (at, "weight", dim), (base, "weight", dim)
                    if dim == 0 and getattr(part, "bias", None) is not None:
                        yield (at, "bias", 0), (base, "weight", 0)
        if {"original_module", "modules_to_save"} <= parts.keys():
            copies = [f"modules_to_save.{name}" for name, _ in parts["modules_to_save"].named_children()]
            for one, other in product(["original_module", *copies], repeat=2):
                for name, value in module.get_submodule(one).named_parameters() if one != other else ():
                    owner, _, tensor = name.rpartition(".")
                    places = [".".join(filter(None, (path, side, owner))) for side in (one, other)]
                    yield from (((places[0], tensor, dim), (places[1], tensor, dim)) for dim in range(value.ndim))


def tensor_at(model: nn.Module, axis: Axis) -> Tensor:
    """The tensor of an axis."""
    found: Tensor = getattr(model.get_submodule(axis[0]), axis[1])
    return found
