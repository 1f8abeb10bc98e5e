"""The groups of transformers, found by how their modules call their parts."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from nodelens.network.architecture import UnclearError
from nodelens.network.groups import Frozen, GroupSlice, PruningGroup, PruningGroups, identity, offsets, shown

from .attention import attention_axes
from .expert_channels import experts_axes
from .projections import Projection, has, join
from .whole_experts import router_axes

FFN = (  # what makes hidden units; what reads them
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
_HALVES = ("gate_up_proj", "Wi")  # of which the first half gates the second


def family_groups(model: nn.Module) -> PruningGroups:
    """Hidden units of feed-forward blocks and experts, heads of attention: by attribute names, shapes and numbers of modules.

    No forward pass. Empty where no module matches a pattern; else the report names, once a module, what is left alone: what
    no pattern matches or what is not understood, weights that two modules share, embeddings, heads and the residual width.
    Whole experts are groups apart.
    """
    found: list[PruningGroup] = []
    frozen: list[Frozen] = []
    shared, names, closed = _shared(model), set[str](), list[str]()
    attends = any("att" in name.lower() for name, _ in model.named_modules())
    for path, module in model.named_modules():
        for pattern in (partial(ffn_axes, attends=attends), attention_axes, experts_axes):
            try:
                groups = pattern(path, module)
                if twice := [piece.name for group in groups for piece in group.slices if piece.name in shared]:
                    raise UnclearError(f"{twice[0]} is a parameter of another module, too")
                found += [_named(group, path, model, names) for group in groups]
            except UnclearError as reason:
                frozen.append(Frozen(path or type(model).__name__, str(reason)))
                closed += [path] if pattern in (attention_axes, experts_axes) else []  # a feed-forward part may be a block
    if not found and not frozen:
        return PruningGroups(())
    apart, whole = router_axes(model, shared)
    return PruningGroups(tuple(found), (*frozen, *_left(model, found, frozen, closed), *whole), apart)


def ffn_axes(path: str, module: nn.Module, attends: bool = True) -> list[PruningGroup]:
    """The group of a feed-forward block, gated or not; empty for any other module. Raises UnclearError.

    Names that other networks give to their layers, such as ``fc1``, count in a model that attends and where what is read is as
    wide as what is put out.
    """
    for names, reads in (*FFN, *(COMMON if attends else ())):
        if has(module, *names, reads):
            return _ffn(path, module, names, reads)
    return []


def _ffn(path: str, module: nn.Module, names: tuple[str, ...], reads: str) -> list[PruningGroup]:
    *made, out = [Projection.of(path, module, name) for name in (*names, reads)]
    if (names, reads) in COMMON and made[0].inputs != out.outputs:
        return []
    n, each = out.inputs, identity(out.inputs)
    rows = offsets((each, n + each)) if names[0] in _HALVES else each
    for name, part in zip(names, made, strict=True):
        if part.outputs != rows.numel():
            raise UnclearError(f"{name} makes {part.outputs} numbers, {reads} reads {n}")
    tied = _norms(path, module, {name.partition(".")[0] for name in (*names, reads)}, n, made[0].inputs)
    exact = not tied and not getattr(module, "activation_sparsity", 0)  # Gemma 3n slices off at a mean over the units
    return [PruningGroup(path, "ffn", n, (*(c for part in made for c in part.makes(rows)), *tied, out.reads(each)), exact=exact)]


def _norms(path: str, module: nn.Module, used: set[str], n: int, residual: int) -> list[GroupSlice]:
    """Cuts of norms over the hidden units. Raises UnclearError for any other tensor as wide as these."""
    others = {name: part for name, part in module.named_children() if name not in used}
    block = any("att" in name for name in others)  # the module is a whole block: its own norms are as wide as the residual
    if block and n == residual:
        return []
    own = [("", *item) for item in module.named_parameters(recurse=False)]
    slices = []
    for name, part, tensor in own + [(k, *item) for k, v in others.items() for item in v.named_parameters(recurse=not block)]:
        if n in tensor.shape and tensor.ndim > 1:
            raise UnclearError(f"holds {join(name, part)} {tuple(tensor.shape)} beside its projections")
        if n in tensor.shape:
            owner, _, last = join(name, part).rpartition(".")
            slices.append(GroupSlice(join(path, owner), last, 0, identity(n), "tied"))
    return slices


def _named(group: PruningGroup, path: str, model: nn.Module, names: set[str]) -> PruningGroup:
    """The group by a name that no other has: its path, and behind it, where one module has two, its first projection."""
    name = group.name if path else type(model).__name__ + group.name
    if name in names:
        name = join(name, group.slices[0].module.rpartition(".")[2])
    names.add(name)
    return replace(group, name=name)


def _shared(model: nn.Module) -> set[str]:
    """Names of the parameters that have more than one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for several in names.values() if len(several) > 1 for name in several}


def _left(model: nn.Module, groups: Sequence[PruningGroup], frozen: Sequence[Frozen], closed: Sequence[str]) -> list[Frozen]:
    """What no pattern matches, by the module that holds it; a weight outside the numbered blocks is an embedding or a head."""
    piece = {piece.module for group in groups for piece in group.slices}
    experts = {group.together.rpartition(".")[0] for group in groups if group.together is not None}
    known = {f.what for f in frozen}
    outside: dict[str, None] = {}
    inside: dict[str, dict[str, None]] = {}
    for name, parameter in model.named_parameters():
        owner, _, tensor = name.rpartition(".")
        holder, _, part = owner.rpartition(".") if tensor == "weight" else (owner, "", tensor)
        if (
            parameter.ndim < 2
            or owner in piece
            or holder in known
            or any(name.startswith(f"{path}." if path else "") for path in closed)
        ):
            continue
        if any(part.isdigit() for part in name.split(".")):
            inside.setdefault(holder, {})[part] = None
        else:
            outside[owner] = None
    report = []
    for path, parts in inside.items():
        why = "whole experts are cut where scope=expert asks for it, and with them" if path in experts else "no pattern matches"
        report.append(Frozen(path, f"{why} {shown(list(parts), 6)}"))
    if outside:
        report.append(Frozen(shown(list(outside), 6), "embeddings and heads are never piece"))
    return [*report, Frozen("the residual width", "norms reduce over it")]
