"""Hook points: the sites of a language model that a call names."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nodelens.engine.dry_run import DryRun, identity
from nodelens.network.expressions import parse_index
from nodelens.network.find_layers import find_layers
from nodelens.network.hooks import Site
from nodelens.network.layers import Layer
from nodelens.network.roles import roles_of

RESIDUAL = {"residual_input": "input", "residual_output": "output"}
MODULE = ("module_input:", "module_output:")


@dataclass(frozen=True)
class HookPoint:
    """A location that many layers have in common: their sites by index, in order."""

    name: str
    sites: dict[int, Layer]


def hook_points(model: nn.Module, names: str | Sequence[str], layers: str | Sequence[int] = "all") -> list[HookPoint]:
    """The sites of each hook point.

    residual_input, residual_output: of the blocks in ``layers`` (all, indices, or an expression such as ``n//2:``);
    module_input:<path>, module_output:<path>: of a module, or of all modules that a glob or a role matches, numbered in order.
    Raises ValueError for an unknown name, module or block, and for ``layers`` without a residual hook point.
    """
    every = [names] if isinstance(names, str) else list(names)
    if not every or len(set(every)) < len(every):
        raise ValueError(f"hook_point is {names!r}: give one, or several different ones")
    if layers != "all" and not any(name in RESIDUAL for name in every):
        raise ValueError(
            f"layers={layers!r} selects blocks and applies to residual_input and residual_output only; hook_point is {names!r}"
        )
    return [_hook_point(model, name, layers) for name in every]


def _hook_point(model: nn.Module, name: str, layers: str | Sequence[int]) -> HookPoint:
    if name in RESIDUAL:
        roles = roles_of(model)
        chosen = _chosen(layers, len(roles.blocks)) if roles.blocks else [0]  # without blocks, roles.layers raises
        return HookPoint(name, {k: roles.layers(f"blocks[{k}].{RESIDUAL[name]}")[0] for k in chosen})
    kind, _, path = name.partition(":")
    if f"{kind}:" not in MODULE or not path:
        raise ValueError(
            f"hook_point is {name!r}; it must be residual_input, residual_output, module_input:<path> or module_output:<path>, "
            "where path is the name of a module, a glob or a role"
        )
    try:
        found = find_layers(model, path)
    except ValueError as error:
        raise ValueError(f"hook_point {name!r}: {error}") from None
    if kind == "module_input":
        found = [la if la.side == "input" else Layer(f"{la.name}.input", la.module, "input") for la in found]
    return HookPoint(name, dict(enumerate(found)))


def _chosen(layers: str | Sequence[int], blocks: int) -> list[int]:
    try:
        items = [layers] if isinstance(layers, str) else [str(k) for k in layers]
        found = {k for item in items for k in parse_index(item, blocks)}
        if not found:
            raise ValueError("it selects no layer")
    except ValueError as error:
        raise ValueError(f"layers={layers!r} for a model with {blocks} blocks: {error}") from None
    return sorted(found)


def unique(points: Sequence[HookPoint]) -> list[Layer]:
    """Every site once; hook points may share sites."""
    return list({layer.name: layer for point in points for layer in point.sites.values()}.values())


def pairs(points: Sequence[HookPoint]) -> list[tuple[str, str]]:
    """Names of consecutive sites of a hook point."""
    found: list[tuple[str, str]] = []
    for point in points:
        names = [layer.name for layer in point.sites.values()]
        found += itertools.pairwise(names)
    return list(dict.fromkeys(found))


def merged(points: Sequence[HookPoint], same: Mapping[str, str]) -> list[HookPoint]:
    """Hook points with duplicate sites merged (a block's output is the next one's input). same: {site: first with its tensor}."""
    by_name = {layer.name: layer for layer in unique(points)}
    return [HookPoint(p.name, {k: by_name[same.get(la.name, la.name)] for k, la in p.sites.items()}) for p in points]


class SeenTensors:
    """The tensors that a forward shows at sites. They are kept alive, so that equal addresses mean equal tensors."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[Tensor, int]]] = {}

    def see(self, site: Site, tensor: Tensor) -> None:
        self.seen.setdefault(site.layer.name, []).append((tensor, tensor._version))

    def duplicates(self) -> dict[str, str]:
        """{site: the first site that showed the same unmodified tensor}, without these first sites."""
        keys = {name: tuple((identity(t), t.stride(), version) for t, version in calls) for name, calls in self.seen.items()}
        first: dict[Any, str] = {}
        return {name: held for name, key in keys.items() if (held := first.setdefault(key, name)) != name}


def check_rows(layers: Sequence[Layer], dry_run: DryRun, tokens: int) -> None:
    """Raises ValueError for a site that does not show one row per token: it runs twice, or has other rows."""
    for layer in layers:
        seen = dry_run.seen.get(f"{layer.name}.output")
        if seen is not None and (seen.calls != 1 or seen.positions != tokens):
            raise ValueError(
                f"{layer.name} shows {seen.positions} rows for {tokens} tokens in each of {seen.calls} calls; the geometry needs "
                "one row per token. Name another module (hook_point=)"
            )
