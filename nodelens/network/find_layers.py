"""Finds the layers of a model by name, glob or role."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from nodelens.messages import check_texts, listed

from .arguments import check_arguments
from .eval_mode import uncompiled
from .experts import ExpertLayer, expert_layers
from .layers import Layer
from .roles import roles_of
from .sharded import class_name, full


def find_layers(model: nn.Module, patterns: str | Sequence[str] = "*", start: Mapping[str, Tensor] | None = None) -> list[Layer]:
    """The layers of a model that match a name, a glob, a role, or a list of these, in the order of the model.

    ``"*"`` means every layer with weights (Linear, convolutions). A name matches any module. Any other glob matches those with
    weights; if there are none, modules without parts such as a ReLU; else modules that hold others, as ``*.mlp`` does. With the
    suffix ``.input`` both match the inputs of the modules, as in ``*.mlp.down_proj.input``. ``*.experts[*].hidden`` matches the
    hidden units of experts that share tensors, one layer per expert. A pattern that matches no name may be a role of ``roles_of``,
    such as ``blocks[n//2:].mlp.hidden`` or ``final_norm``; its layers keep the names of their modules. A model that is a single
    layer is named after its class. start: a state dict from before training. Raises ValueError for a pattern without a match, a
    role that is not found, or a start without the weights of this model.
    """
    check_arguments("nl.find_layers", model, sharded=True)
    check_texts("patterns", patterns, "'fc1', 'layer1.*' or '*'")
    model = uncompiled(model)
    modules = {name or class_name(model): module for name, module in model.named_modules()}
    layers: dict[str, Layer] = {}
    for name, module in modules.items():
        layers |= {name: Layer(name, module), f"{name}.input": Layer(f"{name}.input", module, "input")}
        layers |= {layer.name: layer for layer in expert_layers(name, module)}
    layers |= {name: Layer(name, module) for name, module in modules.items()}  # a submodule may itself be named input
    weighted = [name for name, layer in layers.items() if layer.shape is not None]
    chosen: set[str] = set()
    roles = None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        every = layers if pattern.endswith((".input", ".hidden")) else modules
        names = weighted if pattern == "*" else [name for name in every if _matches(name, pattern)]
        names = names if pattern in names else _preferred([layers[name] for name in names])
        if not names:
            roles = roles or roles_of(model)
            names = [layer.name for layer in roles.layers(pattern)]
        if not names:
            raise ValueError(_no_match(pattern, list(modules), weighted, str(roles)))
        chosen.update(names)
    found = [layer for name, layer in layers.items() if name in chosen]
    return found if start is None else [with_start(layer, start) for layer in found]


def resolved(model: nn.Module, patterns: str | Sequence[str]) -> dict[str, list[str]]:
    """{pattern: names of the matching layers}, for the patterns of ``find_layers``."""
    every = [patterns] if isinstance(patterns, str) else patterns
    return {pattern: [layer.name for layer in find_layers(model, pattern)] for pattern in every}


def _preferred(found: Sequence[Layer]) -> list[str]:
    """The names of the layers whose modules have weights; without any, of those whose modules have no parts; else all."""
    weighted = [la.name for la in found if isinstance(la, ExpertLayer) or Layer(la.name, la.module).shape is not None]
    leaves = [layer.name for layer in found if not next(layer.module.children(), None)]
    return weighted or leaves or [layer.name for layer in found]


def _matches(name: str, pattern: str) -> bool:
    """Whether a name matches a glob; for names with brackets (expert numbers), the brackets of the glob may be literal."""
    return fnmatchcase(name, pattern) or ("[" in name and fnmatchcase(name, pattern.replace("[", "[[]")))


def with_start(layer: Layer, start: Mapping[str, Tensor]) -> Layer:
    """The layer with its weight from before training."""
    now = layer.stored
    if now is None:
        return layer
    name = f"{layer.name}.weight" if f"{layer.name}.weight" in start else "weight"  # the model itself is the layer
    if name not in start or start[name].shape != now.shape:
        there = f"has {tuple(start[name].shape)}" if name in start else "has none"
        raise ValueError(
            f"layer {layer.name!r} has a weight {tuple(now.shape)}, but the start {there}: give weights of the same network"
        )
    return replace(layer, start=full(start[name].detach()).clone())


def _no_match(pattern: str, names: list[str], weighted: list[str], roles: str) -> str:
    near = difflib.get_close_matches(pattern.strip("*"), names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    also = f"; its roles are {roles}" if roles else ""
    return f"no layer matches {pattern!r}{hint} the model has: {listed(weighted) if weighted else 'no layer with weights'}{also}"
