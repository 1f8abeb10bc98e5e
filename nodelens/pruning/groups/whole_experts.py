"""Whole experts of a mixture as units, and routers that choose among fewer experts."""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nodelens.network.architecture import UnclearError
from nodelens.network.experts import Experts
from nodelens.network.groups import Frozen, GroupSlice, PruningGroup, StoredCount, identity

from .projections import join, plain

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts", "n_experts")
CHOSEN = ("top_k", "num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k")  # experts per token
GROUPS = ("num_group", "n_group", "num_groups", "n_groups", "num_expert_group")


def whole_expert_groups(model: nn.Module, shared: Collection[str] = ()) -> tuple[tuple[PruningGroup, ...], tuple[Frozen, ...]]:
    """One group per mixture, whose units are its whole experts, named by its module; and the mixtures that stay whole, and why.

    Removing an expert removes its row from the experts' tensors, from the router's, and from other tensors of the block that
    holds both. A router is understood if it is a sibling of the experts and stores the number of experts and of experts per token.
    ``min_keep`` is the number it needs to choose from. shared: names of parameters that several modules hold.
    """
    found, frozen, mixtures = list[PruningGroup](), list[Frozen](), 0
    for path, module in model.named_modules():
        try:
            experts = Experts.of(module)
        except UnclearError:
            continue  # reported with the experts' channels
        mixtures += experts is not None
        try:
            found += [_expert_group(model, path, experts, shared)] if experts is not None else []
        except UnclearError as reason:
            frozen.append(Frozen(path or type(model).__name__, f"experts stay whole: {reason}"))
    if len(found) == mixtures and len({group.n for group in found}) == 1:
        found[0] = replace(found[0], counts=(*found[0].counts, *_model_counts(model, found)))
    return tuple(found), tuple(frozen)


@contextmanager
def unrouted(model: nn.Module, groups: Sequence[PruningGroup], removed: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Inside the context, no token is routed to removed experts, as if their logits were minus infinity.

    Each router returns what the sliced router would, with the original expert ids and scores of -inf for removed experts; hooks
    see that output. Raises ValueError for a router that is masked already and, when it is called, for one whose output is not
    scores (n, E), weights (n, k) and ids (n, k).
    """
    with ExitStack() as stack:
        for group in groups:
            if removed.get(group.name):
                stack.enter_context(_masked_router(model, group, removed[group.name]))
        yield


class _Place(NamedTuple):
    """A tensor of a module below a mixture's block, and the dimension along which experts lie."""

    module: str
    tensor: str
    dim: int


def _expert_group(model: nn.Module, path: str, experts: Experts, shared: Collection[str]) -> PruningGroup:
    """Raises UnclearError if the mixture's experts cannot be removed one by one."""
    n, parent = len(experts), path.rpartition(".")[0]
    block = model.get_submodule(parent)
    name, k = _router(block, experts)
    router = join(parent, name)
    places = [*_places(router, block.get_submodule(name), n), *_places(parent, block, n, recurse=False)]
    if not any(f"{place.module}.".startswith(f"{router}.") and place[1:] == ("weight", 0) for place in places):
        raise UnclearError(f"no weight of its router {name} has one row per expert")
    own = [key for key, tensor in experts.module._parameters.items() if tensor is not None]
    if not all(plain(weight) for module in (experts.module, block.get_submodule(name)) for weight in module.parameters()):
        raise UnclearError("weights are quantized or computed from other tensors")
    rows = (experts.up_name, "down_proj")  # the weights of the experts; all else is tied
    slices = [GroupSlice(path, key, 0, identity(n), "producer") for key in rows]
    slices += [GroupSlice(path, key, 0, identity(n), "tied") for key in own if key not in rows]
    slices += [GroupSlice(place.module, place.tensor, place.dim, identity(n), "tied") for place in places]
    if tied := [piece.name for piece in slices if piece.name in shared]:
        raise UnclearError(f"{tied[0]} is also a parameter of another module")
    counts = [StoredCount(where, key, 1) for where in (path, router, parent) for key in _counting(model.get_submodule(where), n)]
    return PruningGroup(path, "expert", n, tuple(slices), tuple(counts), router=router, min_keep=k)


def _router(block: nn.Module, experts: Experts) -> tuple[str, int]:
    """The name of the module that routes tokens to a block's experts, and how many it needs. Raises UnclearError."""
    n = len(experts)
    if experts.blockwise:
        raise UnclearError("each is called with its own block of rows")
    candidates = [
        (name, module)
        for name, module in block.named_children()
        if module is not experts.module
        and _counting(module, n)
        and _number(module, CHOSEN)
        and next(module.parameters(), None) is not None
    ]
    if len(candidates) != 1:
        children = ", ".join(f"{name} ({type(module).__name__})" for name, module in block.named_children())
        raise UnclearError(
            f"the router is not clear: {len(candidates) or 'none'} of {children or 'no modules'} stores both the number of experts "
            f"({n}) and of experts per token"
        )
    name, module = candidates[0]
    groups = max(_number(holder, GROUPS) or 0 for holder in (module, block))
    if groups > 1:
        raise UnclearError(f"its router {name} ({type(module).__name__}) chooses among {groups} groups of equally many experts")
    return name, max(_number(module, CHOSEN) or 0, 2 * (groups == 1))  # a group is scored by its two best experts


def _places(path: str, module: nn.Module, n: int, recurse: bool = True) -> list[_Place]:
    """Tensors with one entry per expert. Raises UnclearError for one with two such dimensions, or with integers (expert ids)."""
    found = []
    named = [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]
    for name, tensor in named:
        dims = [dim for dim, size in enumerate(tensor.shape) if size == n]
        if len(dims) > 1 or (recurse and not tensor.is_floating_point()):
            what = "has two dimensions of the number of experts" if len(dims) > 1 else "holds integers"
            raise UnclearError(f"{join(path, name)} {tuple(tensor.shape)} {what}")
        owner, _, last = join(path, name).rpartition(".")
        found += [_Place(owner, last, dim) for dim in dims]
    return found


def _model_counts(model: nn.Module, groups: Sequence[PruningGroup]) -> list[StoredCount]:
    """The number of experts where the model stores one for all mixtures; it changes only if all lose the same number."""
    n, among = groups[0].n, tuple(group.name for group in groups)
    own = {count.module for group in groups for count in group.counts}
    seen, found = set[int](), []
    for path, module in model.named_modules():
        if path not in own:
            found += [StoredCount(path, key, 1, among) for key in _counting(module, n)]
        config = getattr(module, "config", None)
        if config is not None and id(config) not in seen:
            seen.add(id(config))
            found += [StoredCount(path, f"config.{key}", 1, among) for key in _counting(config, n)]
    return found


@contextmanager
def _masked_router(model: nn.Module, group: PruningGroup, units: Sequence[int]) -> Iterator[None]:
    """Inside the context, a mixture's router does not choose the given experts."""
    assert group.router is not None
    router: Any = model.get_submodule(group.router)
    before = router.__dict__.get("forward")
    if getattr(before, "func", None) is _route:
        raise ValueError(f"experts of {group.name!r} are masked already: mask all of them in one call")
    kept = torch.tensor(sorted(set(range(group.n)) - set(units)))
    # an Edit changes one tensor; here three outputs depend on the router's arguments
    router.forward = partial(_route, router, group, kept)
    try:
        yield
    finally:
        del router.forward
        if before is not None:
            router.forward = before


def _route(router: nn.Module, group: PruningGroup, kept: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The sliced router's output with the original expert ids; per-expert tensors among the arguments are sliced too."""
    sliced = _slice(router, group, kept)
    given = [_sliced(value, group.n, kept) for value in args]
    output = type(sliced).forward(sliced, *given, **{key: _sliced(value, group.n, kept) for key, value in kwargs.items()})
    parts = list(output) if type(output) in (tuple, list) else []
    tensors = [(k, part) for k, part in enumerate(parts) if isinstance(part, Tensor)]
    ids = [k for k, part in tensors if not part.is_floating_point()]
    scores = [k for k, part in tensors if part.is_floating_point() and part.ndim and part.shape[-1] == len(kept)]
    if len(ids) != 1 or not scores or len(tensors) < 3:
        shapes = ", ".join(str(tuple(part.shape)) for _, part in tensors) or type(output).__name__
        raise ValueError(
            f"router {group.router} ({type(router).__name__}) returns {shapes}; masking experts needs scores (n, E), "
            "weights (n, k) and ids (n, k): use apply=slice, or leave the group out with freeze="
        )
    chosen, known = parts[ids[0]], parts[scores[0]]
    original = kept.to(known.device)
    parts[ids[0]] = original[chosen.long()].to(chosen.dtype)
    parts[scores[0]] = known.new_full((*known.shape[:-1], group.n), -torch.inf).index_copy(-1, original, known)
    return type(output)(parts)


def _slice(router: nn.Module, group: PruningGroup, kept: Tensor) -> nn.Module:
    """A copy of the router with fewer experts, which shares everything that is not sliced, hooks included."""
    assert group.router is not None
    sliced = _shallow_copy(router)
    for piece in group.slices:
        if piece.module == group.router or piece.module.startswith(f"{group.router}."):
            part = sliced.get_submodule(piece.module[len(group.router) :].removeprefix("."))
            tensors: dict[str, Any] = part._parameters if piece.tensor in part._parameters else part._buffers
            tensors[piece.tensor] = tensors[piece.tensor].index_select(piece.dim, kept.to(tensors[piece.tensor].device))
    for count in group.counts:
        if count.module == group.router:
            sliced.__dict__[count.attribute] = len(kept)
    return sliced


def _shallow_copy(module: nn.Module) -> nn.Module:
    """A copy that shares the module's tensors; replacing a tensor of the copy does not change the module."""
    shell = copy.copy(module)
    for tensors in ("_parameters", "_buffers"):
        shell.__dict__[tensors] = dict(getattr(module, tensors))
    shell.__dict__["_modules"] = {name: part and _shallow_copy(part) for name, part in module._modules.items()}
    return shell


def _sliced(value: Any, n: int, kept: Tensor) -> Any:
    per_expert = isinstance(value, Tensor) and value.shape == (n,)
    return value.index_select(0, kept.to(value.device)) if per_expert else value


def _counting(holder: Any, n: int) -> list[str]:
    """Names under which a module or a config stores the number of experts."""
    return [name for name in COUNTS if _number(holder, (name,)) == n]


def _number(holder: Any, names: Sequence[str]) -> int | None:
    found = (getattr(holder, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)
