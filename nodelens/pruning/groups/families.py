"""The pruning groups of transformers, found by the attribute names of their modules."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate

from torch import nn

from nodelens.messages import listed
from nodelens.network.adapters import in_adapter
from nodelens.network.architecture import UnclearError
from nodelens.network.groups import Frozen, GroupSlice, PruningGroup, PruningGroups, identity, offsets

from .adapters import RANKS
from .attention import attention_groups
from .expert_channels import expert_channel_groups
from .projections import Projection, has, join
from .state_space import state_space_groups, state_space_heads
from .whole_experts import whole_expert_groups

FFN = (  # projections that compute the hidden units; the projection that reads them
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("up_proj",), "down_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("intermediate.dense",), "output.dense"),
    (("c_fc",), "c_proj"),
    (("w1", "w3"), "w2"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("fc_in",), "fc_out"),
    (("intermediate_dense",), "output_dense"),
    (("ffn",), "ffn_output"),
    (("Wi",), "Wo"),
)
COMMON = ((("fc1",), "fc2"), (("linear1",), "linear2"), (("lin1",), "lin2"))  # of many other networks, too
OTHERS = (attention_groups, expert_channel_groups, state_space_groups, state_space_heads)
_HALVES = ("gate_up_proj", "Wi")  # fused projections whose first half gates the second


def family_groups(model: nn.Module, rest: bool = True) -> PruningGroups:
    """Hidden units of feed-forward blocks and experts, attention heads, and channels of state spaces, by names, shapes and counts.

    No forward pass is run. Empty if no module matches a pattern. Otherwise ``frozen`` lists, once per module, what is not pruned:
    modules that match no pattern or are not understood, shared weights, embeddings, output heads and the residual width.
    Whole experts are opt-in groups. rest: report modules that match no pattern, too.
    """
    found: list[PruningGroup] = []
    frozen: list[Frozen] = []
    shared, names, excluded = _shared(model), set[str](), list[str]()
    attends = any("att" in name.lower() for name, _ in model.named_modules())
    for path, module in model.named_modules():
        for pattern in (partial(ffn_groups, attends=attends), *OTHERS):
            try:
                groups = pattern(path, module)
                if tied := [piece.name for group in groups for piece in group.slices if piece.name in shared]:
                    raise UnclearError(f"{tied[0]} is also a parameter of another module")
                found += [_named(group, path, model, names) for group in groups]
            except UnclearError as reason:
                frozen.append(Frozen(path or type(model).__name__, str(reason)))
                # a module matched as feed-forward may be a whole block, whose other parts are still reported
                excluded += [path] if pattern in OTHERS else []
    if not found and not frozen:
        return PruningGroups(())
    experts, unclear = whole_expert_groups(model, shared)
    unmatched = _unmatched(model, found, frozen, excluded) if rest else []
    return PruningGroups(tuple(found), (*frozen, *unmatched, *unclear), experts)


def ffn_groups(path: str, module: nn.Module, attends: bool = True) -> list[PruningGroup]:
    """The group of a feed-forward block, gated or not; empty for any other module.

    Names that are common in other networks, such as ``fc1``, match only in models with attention and where the block's input and
    output have the same width. Raises UnclearError if a matching block is not understood.
    """
    for names, down in (*FFN, *(COMMON if attends else ())) if module._modules else ():
        if has(module, *names, down):
            return _ffn(path, module, names, down)
    return []


def _ffn(path: str, module: nn.Module, names: tuple[str, ...], down: str) -> list[PruningGroup]:
    *ups, out = [Projection.of(path, module, name) for name in (*names, down)]
    if (names, down) in COMMON and ups[0].inputs != out.outputs:
        return []
    n, each = out.inputs, identity(out.inputs)
    rows = offsets((each, n + each)) if names[0] in _HALVES else each
    for name, part in zip(names, ups, strict=True):
        if part.outputs != rows.numel():
            raise UnclearError(f"{name} has {part.outputs} outputs, {down} has {n} inputs")
    tied = _norms(path, module, {name.partition(".")[0] for name in (*names, down)}, n, ups[0].inputs, rows.numel())
    exact = not tied and not getattr(module, "activation_sparsity", 0)  # Gemma 3n thresholds at a mean over the units
    producers = [piece for part in ups for piece in part.producers(rows)]
    return [PruningGroup(path, "ffn", n, (*producers, *tied, *out.consumers(each)), exact=exact)]


def _norms(path: str, module: nn.Module, used: set[str], n: int, residual: int, fused: int) -> list[GroupSlice]:
    """Slices of norms over the hidden units. Raises UnclearError for any other tensor of that width, or of the fused outputs."""
    others = {name: part for name, part in module.named_children() if name not in used}
    block = any("att" in name for name in others)  # the module is a whole block, whose norms have the residual width
    if block and n == residual:
        return []
    own = [("", *item) for item in module.named_parameters(recurse=False)]
    slices = []
    for name, part, tensor in own + [(k, *item) for k, v in others.items() for item in v.named_parameters(recurse=not block)]:
        if tensor.ndim > 1 and (n in tensor.shape or (fused > n and fused in tensor.shape)):
            raise UnclearError(f"has the parameter {join(name, part)} {tuple(tensor.shape)} outside its projections")
        if n in tensor.shape:
            owner, _, last = join(name, part).rpartition(".")
            slices.append(GroupSlice(join(path, owner), last, 0, identity(n), "tied"))
    return slices


def _named(group: PruningGroup, path: str, model: nn.Module, names: set[str]) -> PruningGroup:
    """The group with a unique name: its path, followed by its first projection if the module has two groups."""
    name = group.name if path else type(model).__name__ + group.name
    if name in names:
        name = join(name, group.slices[0].module.rpartition(".")[2])
    names.add(name)
    return replace(group, name=name)


def _shared(model: nn.Module) -> set[str]:
    """Names of the parameters that several modules hold."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for aliases in names.values() if len(aliases) > 1 for name in aliases}


def _unmatched(model: nn.Module, groups: Sequence[PruningGroup], frozen: Sequence[Frozen], excluded: Sequence[str]) -> list[Frozen]:
    """Weights that match no pattern, by the module that holds them; those outside numbered blocks are embeddings or heads."""
    sliced = {piece.module for group in groups for piece in group.slices}
    experts = {group.equal_count.rpartition(".")[0] for group in groups if group.equal_count is not None}
    reported, left_out = {f.what for f in frozen}, set(excluded)
    outside: dict[str, None] = {}
    adapted = False
    inside: dict[str, dict[str, None]] = {}
    for name, parameter in model.named_parameters():
        owner, _, tensor = name.rpartition(".")
        holder, _, part = owner.rpartition(".") if tensor == "weight" else (owner, "", tensor)
        if (
            parameter.ndim < 2
            or owner in sliced
            or holder in reported
            or not left_out.isdisjoint(["", *accumulate(owner.split("."), join)])
        ):
            continue
        if in_adapter(name):
            adapted = True
        elif any(part.isdigit() for part in name.split(".")):
            inside.setdefault(holder, {})[part] = None
        else:
            outside[owner] = None
    report = []
    for path, parts in inside.items():
        why = "pruned only with whole experts (scope=expert):" if path in experts else "no pattern matches"
        report.append(Frozen(path, f"{why} {listed(list(parts), 6)}"))
    convolutions = [owner for owner in outside if isinstance(model.get_submodule(owner), nn.modules.conv._ConvNd)]
    if len(convolutions) > 1:  # a single one embeds patches
        why = "groups are searched in transformer blocks only; convolutions outside them need custom_groups="
        report.append(Frozen(listed(convolutions, 6), why))
        outside = {owner: None for owner in outside if owner not in convolutions}
    if adapted:
        report.append(Frozen("adapters", RANKS))
    if outside:
        report.append(Frozen(listed(list(outside), 6), "embeddings and output heads are not pruned"))
    return [*report, Frozen("the residual width", "norms reduce over it")]
