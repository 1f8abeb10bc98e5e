"""Layers found in a model by name, glob or role."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from .experts import expert_layers
from .layers import Layer
from .roles import roles_of


def find_layers(model: nn.Module, patterns: str | Sequence[str] = "*", start: Mapping[str, Tensor] | None = None) -> list[Layer]:
    """The layers of a model that match a name, a glob, a role, or a list of them, in the model's own order.

    ``"*"`` means every layer with weights (Linear, convolutions); a name or any other glob finds any module, and with
    ``.input`` behind it the units that the module reads, such as ``*.mlp.down_proj.input``; ``*.experts[*].hidden`` finds the
    hidden units of experts that share tensors, a layer an expert. What matches none may be a role of ``roles_of``, such as
    ``blocks[n//2:].mlp.hidden`` or ``final_norm``: the layers go by their modules' names all the same. A model that is itself a
    layer goes by its class's name. start: a state dict of before training. Raises ValueError for a pattern without a match, a
    role that is not there, or a start that has not this model's weights.
    """
    modules = {name or type(model).__name__: module for name, module in model.named_modules()}
    layers: dict[str, Layer] = {}
    for name, module in modules.items():
        layers |= {name: Layer(name, module), f"{name}.input": Layer(f"{name}.input", module, "input")}
        layers |= {layer.name: layer for layer in expert_layers(name, module)}
    layers |= {name: Layer(name, module) for name, module in modules.items()}  # a submodule may be called input
    weighted = [name for name, layer in layers.items() if layer.weight is not None]
    chosen: set[str] = set()
    roles = None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        every = layers if pattern.endswith((".input", ".hidden")) else modules
        names = weighted if pattern == "*" else [name for name in every if _matches(name, pattern)]
        if not names:
            roles = roles or roles_of(model)
            names = [layer.name for layer in roles.layers(pattern)]
        if not names:
            raise ValueError(_no_match(pattern, list(modules), weighted, str(roles)))
        chosen.update(names)
    found = [layer for name, layer in layers.items() if name in chosen]
    return found if start is None else [started(layer, start) for layer in found]


def resolved(model: nn.Module, patterns: str | Sequence[str]) -> dict[str, list[str]]:
    """{pattern: names of its layers}, of what ``find_layers`` takes."""
    every = [patterns] if isinstance(patterns, str) else patterns
    return {pattern: [layer.name for layer in find_layers(model, pattern)] for pattern in every}


def _matches(name: str, pattern: str) -> bool:
    """Whether a name fits a glob; brackets in a name are an expert's number, and stand for themselves in a glob too."""
    return fnmatchcase(name, pattern) or ("[" in name and fnmatchcase(name, pattern.replace("[", "[[]")))


def started(layer: Layer, start: Mapping[str, Tensor]) -> Layer:
    """A layer with its weight at the start."""
    now = layer.tensor
    if now is None:
        return layer
    name = f"{layer.name}.weight" if f"{layer.name}.weight" in start else "weight"  # the model itself is the layer
    if name not in start or start[name].shape != now.shape:
        there = f"has {tuple(start[name].shape)}" if name in start else "does not have it"
        raise ValueError(
            f"layer {layer.name!r} has a weight {tuple(now.shape)}, the start {there}: give weights of the same network"
        )
    return replace(layer, start=start[name].detach().clone())


def _no_match(pattern: str, names: list[str], weighted: list[str], roles: str) -> str:
    near = difflib.get_close_matches(pattern.strip("*"), names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    shown = ", ".join(weighted[:12]) + (f" and {len(weighted) - 12} more" if len(weighted) > 12 else "")
    also = f"; its roles are {roles}" if roles else ""
    return f"no layer matches {pattern!r}{hint} the model has: {shown or 'no layer with weights'}{also}"
