"""Whole experts of a mixture: groups of what a router chooses among, and a router that chooses among fewer."""

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
from nodelens.network.groups import Frozen, GroupSlice, Patch, PruningGroup, identity

from .projections import join, plain

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts", "n_experts")
CHOSEN = ("top_k", "num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k")  # experts that a token goes to
GROUPS = ("num_group", "n_group", "num_groups", "n_groups", "num_expert_group")


def router_axes(model: nn.Module, shared: Collection[str] = ()) -> tuple[tuple[PruningGroup, ...], tuple[Frozen, ...]]:
    """A group a mixture, whose units are its whole experts, named by its module; and which mixtures stay whole, and why.

    An expert goes with its row of the experts' tensors, of the router's, and of those that the block of both holds beside them. A
    router is understood that chooses by itself: a sibling of the experts that keeps their number and that of a token, in its own
    attributes. ``least`` is what it needs to choose. shared: names of parameters that have more than one.
    """
    found, frozen, mixtures = list[PruningGroup](), list[Frozen](), 0
    for path, module in model.named_modules():
        try:
            experts = Experts.of(module)
        except UnclearError:
            continue  # reported with the experts' channels
        mixtures += experts is not None
        try:
            found += [_axis(model, path, experts, shared)] if experts is not None else []
        except UnclearError as reason:
            frozen.append(Frozen(path or type(model).__name__, f"experts stay whole: {reason}"))
    if len(found) == mixtures and len({group.n for group in found}) == 1:
        found[0] = replace(found[0], patches=(*found[0].patches, *_model_patches(model, found)))
    return tuple(found), tuple(frozen)


@contextmanager
def unrouted(model: nn.Module, groups: Sequence[PruningGroup], removed: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Inside, no token goes to removed experts: routers choose among the others, as if the logits of these were minus infinity.

    A router answers as its slice does, with the experts' own numbers and scores of -inf where one is gone; hooks see that answer.
    Raises ValueError for a router that is masked already and, when it is called, for one that puts out something else than scores
    (n, E), weights (n, k) and ids (n, k).
    """
    with ExitStack() as stack:
        for group in groups:
            if removed.get(group.name):
                stack.enter_context(_answering(model, group, removed[group.name]))
        yield


class _Place(NamedTuple):
    """A tensor of a module below a mixture's block, and the dimension in which experts lie."""

    module: str
    tensor: str
    dim: int


def _axis(model: nn.Module, path: str, experts: Experts, shared: Collection[str]) -> PruningGroup:
    """Raises UnclearError where the mixture's experts cannot be removed one by one."""
    n, above = len(experts), path.rpartition(".")[0]
    block = model.get_submodule(above)
    name, k = _router(block, experts)
    router = join(above, name)
    held = [*_places(router, block.get_submodule(name), n), *_places(above, block, n, recurse=False)]
    if not any(f"{place.module}.".startswith(f"{router}.") and place[1:] == ("weight", 0) for place in held):
        raise UnclearError(f"no weight of its router {name} has a row an expert")
    own = [key for key, tensor in experts.module._parameters.items() if tensor is not None]
    if not all(plain(weight) for module in (experts.module, block.get_submodule(name)) for weight in module.parameters()):
        raise UnclearError("weights are quantised, or made of other tensors")
    rows = (experts.up_name, "down_proj")  # what makes an expert; the rest goes with it
    slices = [GroupSlice(path, key, 0, identity(n), "producer") for key in rows]
    slices += [GroupSlice(path, key, 0, identity(n), "tied") for key in own if key not in rows]
    slices += [GroupSlice(place.module, place.tensor, place.dim, identity(n), "tied") for place in held]
    if twice := [piece.name for piece in slices if piece.name in shared]:
        raise UnclearError(f"{twice[0]} is a parameter of another module, too")
    patches = [Patch(where, key, 1) for where in (path, router, above) for key in _counting(model.get_submodule(where), n)]
    return PruningGroup(path, "expert", n, tuple(slices), tuple(patches), router=router, least=k)


def _router(block: nn.Module, experts: Experts) -> tuple[str, int]:
    """The name of the module that chooses among a block's experts, and how many it needs. Raises UnclearError."""
    n = len(experts)
    if experts.blockwise:
        raise UnclearError("they are called with a block of rows each")
    found = [
        (name, module)
        for name, module in block.named_children()
        if module is not experts.module
        and _counting(module, n)
        and _number(module, CHOSEN)
        and next(module.parameters(), None) is not None
    ]
    if len(found) != 1:
        there = ", ".join(f"{name} ({type(module).__name__})" for name, module in block.named_children())
        raise UnclearError(
            f"{len(found) or 'none'} of {there or 'nothing'} keeps both the number of experts ({n}) and that of a token: which "
            "one is the router?"
        )
    name, module = found[0]
    groups = max(_number(holder, GROUPS) or 0 for holder in (module, block))
    if groups > 1:
        raise UnclearError(f"its router {name} ({type(module).__name__}) chooses among {groups} groups of experts, of one size")
    return name, max(_number(module, CHOSEN) or 0, 2 * (groups == 1))  # a group is scored by its two best


def _places(path: str, module: nn.Module, n: int, recurse: bool = True) -> list[_Place]:
    """Tensors with an entry an expert. Raises UnclearError for one with two such dimensions, or of numbers of experts."""
    found = []
    named = [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]
    for name, tensor in named:
        dims = [dim for dim, size in enumerate(tensor.shape) if size == n]
        if len(dims) > 1 or (recurse and not tensor.is_floating_point()):
            what = "does not tell which dimension is that of the experts" if len(dims) > 1 else "holds whole numbers"
            raise UnclearError(f"{join(path, name)} {tuple(tensor.shape)} {what}")
        owner, _, last = join(path, name).rpartition(".")
        found += [_Place(owner, last, dim) for dim in dims]
    return found


def _model_patches(model: nn.Module, groups: Sequence[PruningGroup]) -> list[Patch]:
    """The number of experts where the model keeps it for all mixtures together: it falls where all lose as many."""
    n, among = groups[0].n, tuple(group.name for group in groups)
    own = {patch.module for group in groups for patch in group.patches}
    seen, found = set[int](), []
    for path, module in model.named_modules():
        if path not in own:
            found += [Patch(path, key, 1, among) for key in _counting(module, n)]
        config = getattr(module, "config", None)
        if config is not None and id(config) not in seen:
            seen.add(id(config))
            found += [Patch(path, f"config.{key}", 1, among) for key in _counting(config, n)]
    return found


@contextmanager
def _answering(model: nn.Module, group: PruningGroup, units: Sequence[int]) -> Iterator[None]:
    """Inside, a mixture's router does without some experts."""
    assert group.router is not None
    router: Any = model.get_submodule(group.router)
    before = router.__dict__.get("forward")
    if getattr(before, "func", None) is _answer:
        raise ValueError(f"experts of {group.name!r} are masked already: name all that are to go at once")
    stays = torch.tensor(sorted(set(range(group.n)) - set(units)))
    # an edit changes one tensor; here three depend on what the router was called with
    router.forward = partial(_answer, router, group, stays)
    try:
        yield
    finally:
        del router.forward
        if before is not None:
            router.forward = before


def _answer(router: nn.Module, group: PruningGroup, stays: Tensor, *args: Any, **kwargs: Any) -> Any:
    """What the slice puts out, in the experts' own numbers; per-expert tensors that it is called with are sliced, too."""
    few = _slice(router, group, stays)
    given = [_fewer(value, group.n, stays) for value in args]
    output = type(few).forward(few, *given, **{key: _fewer(value, group.n, stays) for key, value in kwargs.items()})
    parts = list(output) if type(output) in (tuple, list) else []
    tensors = [(k, part) for k, part in enumerate(parts) if isinstance(part, Tensor)]
    ids = [k for k, part in tensors if not part.is_floating_point()]
    scores = [k for k, part in tensors if part.is_floating_point() and part.ndim and part.shape[-1] == len(stays)]
    if len(ids) != 1 or not scores or len(tensors) < 3:
        shown = ", ".join(str(tuple(part.shape)) for _, part in tensors) or type(output).__name__
        raise ValueError(
            f"router {group.router} ({type(router).__name__}) puts out {shown}; experts are shut off where it is scores (n, E), "
            "weights (n, k) and ids (n, k): use apply=slice, or leave it out with freeze="
        )
    chosen, known = parts[ids[0]], parts[scores[0]]
    at = stays.to(known.device)
    parts[ids[0]] = at[chosen.long()].to(chosen.dtype)
    parts[scores[0]] = known.new_full((*known.shape[:-1], group.n), -torch.inf).index_copy(-1, at, known)
    return type(output)(parts)


def _slice(router: nn.Module, group: PruningGroup, stays: Tensor) -> nn.Module:
    """The router with fewer experts: a module of its own that shares all that is not piece, hooks too."""
    assert group.router is not None
    few = _shell(router)
    for piece in group.slices:
        if piece.module == group.router or piece.module.startswith(f"{group.router}."):
            part = few.get_submodule(piece.module[len(group.router) :].removeprefix("."))
            held: dict[str, Any] = part._parameters if piece.tensor in part._parameters else part._buffers
            held[piece.tensor] = held[piece.tensor].index_select(piece.dim, stays.to(held[piece.tensor].device))
    for patch in group.patches:
        if patch.module == group.router:
            few.__dict__[patch.attribute] = len(stays)
    return few


def _shell(module: nn.Module) -> nn.Module:
    """A module that holds the same tensors as another, and may hold others."""
    shell = copy.copy(module)
    for held in ("_parameters", "_buffers"):
        shell.__dict__[held] = dict(getattr(module, held))
    shell.__dict__["_modules"] = {name: part and _shell(part) for name, part in module._modules.items()}
    return shell


def _fewer(value: Any, n: int, stays: Tensor) -> Any:
    per_expert = isinstance(value, Tensor) and value.shape == (n,)
    return value.index_select(0, stays.to(value.device)) if per_expert else value


def _counting(holder: Any, n: int) -> list[str]:
    """Names under which a module, or a config, keeps the number of experts."""
    return [name for name in COUNTS if _number(holder, (name,)) == n]


def _number(holder: Any, names: Sequence[str]) -> int | None:
    found = (getattr(holder, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)
