"""Hook points: where in a language model rows are read, by the words of a call."""

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
    """A place that many layers have: their sites by index, in order."""

    name: str
    sites: dict[int, Layer]


def hook_points(model: nn.Module, names: str | Sequence[str], layers: str | Sequence[int] = "all") -> list[HookPoint]:
    """The sites of each hook point.

    residual_input, residual_output: of the blocks that ``layers`` chooses: all, indices, or an expression such as ``n//2:``;
    module_input:<path>, module_output:<path>: of a module, or of all that a glob or a role names, counted in their order.
    Raises ValueError for another word, a module or block that is not there, and ``layers`` where no hook point is residual.
    """
    every = [names] if isinstance(names, str) else list(names)
    if not every or len(set(every)) < len(every):
        raise ValueError(f"hook_point is {names!r}: give one, or several that differ")
    if layers != "all" and not any(name in RESIDUAL for name in every):
        raise ValueError(f"layers={layers!r} chooses among blocks, of residual_input and residual_output; hook_point is {names!r}")
    return [_hook_point(model, name, layers) for name in every]


def _hook_point(model: nn.Module, name: str, layers: str | Sequence[int]) -> HookPoint:
    if name in RESIDUAL:
        roles = roles_of(model)
        chosen = _chosen(layers, len(roles.blocks)) if roles.blocks else [0]  # of none: the roles say why
        return HookPoint(name, {k: roles.layers(f"blocks[{k}].{RESIDUAL[name]}")[0] for k in chosen})
    kind, _, path = name.partition(":")
    if f"{kind}:" not in MODULE or not path:
        raise ValueError(
            f"hook_point is {name!r}; it is residual_input, residual_output, module_input:<path> or module_output:<path>, "
            "path a module's name, a glob or a role"
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
            raise ValueError("it names no layer")
    except ValueError as error:
        raise ValueError(f"layers={layers!r} of a model of {blocks} blocks: {error}") from None
    return sorted(found)


def unique(points: Sequence[HookPoint]) -> list[Layer]:
    """Every site once: hook points may have some in common."""
    return list({layer.name: layer for point in points for layer in point.sites.values()}.values())


def pairs(points: Sequence[HookPoint]) -> list[tuple[str, str]]:
    """Names of sites that follow each other at one hook point."""
    found: list[tuple[str, str]] = []
    for point in points:
        names = [layer.name for layer in point.sites.values()]
        found += itertools.pairwise(names)
    return list(dict.fromkeys(found))


def merged(points: Sequence[HookPoint], same: Mapping[str, str]) -> list[HookPoint]:
    """The hook points, sites that show one tensor as one: a block's output is the next one's input. same: {site: the first}."""
    by_name = {layer.name: layer for layer in unique(points)}
    return [HookPoint(p.name, {k: by_name[same.get(la.name, la.name)] for k, la in p.sites.items()}) for p in points]


class Shown:
    """The tensors that a forward shows at sites, held so that each has a place of its own."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[Tensor, int]]] = {}

    def see(self, site: Site, tensor: Tensor) -> None:
        self.seen.setdefault(site.layer.name, []).append((tensor, tensor._version))

    def same(self) -> dict[str, str]:
        """{site: the first that shows the same tensor, unchanged}, for all but these first."""
        keys = {name: tuple((identity(t), t.stride(), version) for t, version in calls) for name, calls in self.seen.items()}
        first: dict[Any, str] = {}
        return {name: held for name, key in keys.items() if (held := first.setdefault(key, name)) != name}


def check_rows(layers: Sequence[Layer], dry_run: DryRun, tokens: int) -> None:
    """Raises ValueError for a site that does not show one row a token: it ran twice, or works on other rows."""
    for layer in layers:
        seen = dry_run.seen.get(f"{layer.name}.output")
        if seen is not None and (seen.calls != 1 or seen.positions != tokens):
            raise ValueError(
                f"{layer.name} shows {seen.positions} rows for {tokens} tokens in each of {seen.calls} calls: the geometry is of "
                "one row a token; name another module (hook_point=)"
            )
