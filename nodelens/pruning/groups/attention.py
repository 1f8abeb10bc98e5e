"""Pruning groups of attention modules, whose units are heads, or groups of query heads that share keys and values."""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nodelens.network.architecture import UnclearError
from nodelens.network.groups import GroupSlice, PruningGroup, StoredCount, offsets, span
from nodelens.network.open_attention import OpenAttention

from .projections import Projection, attribute, child, has, join

SEPARATE = (  # projections of queries, keys and values; possible names of the output projection
    (("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj", "dense", "Wo")),
    (("self.query", "self.key", "self.value"), ("output.dense",)),
    (("attention.query", "attention.key", "attention.value"), ("output.dense",)),
    (("q_lin", "k_lin", "v_lin"), ("out_lin",)),
)
FUSED = (  # one projection for all three; the output projection; whether q, k and v are blocks, or interleaved per group
    ("qkv_proj", "o_proj", True),
    ("c_attn", "c_proj", True),
    ("Wqkv", "Wo", True),
    ("query_key_value", "dense", False),
)
_WIDTH = ("head_dim", "head_size", "attention_head_size")
_QUERIES = ("num_heads", "num_attention_heads", "n_heads")
_GROUPS = ("num_key_value_heads", "num_kv_heads")
_CHANNELS = ("embed_dim", "all_head_size", "split_size", "inner_dim")
_IN_CONFIG = ("num_attention_heads", "num_key_value_heads")
_PER_HEAD_ARGUMENTS = ("alibi", "position_bias", "shared_kv_states")  # computed by another module, one entry per head


@dataclass(frozen=True)
class _Heads:
    """``groups`` groups of ``rep`` query heads and one key head of dimension ``width``, and one value head of ``value``."""

    groups: int
    rep: int
    width: int
    value: int

    @property
    def spans(self) -> tuple[int, int, int]:
        """Dimensions per group of queries, keys and values."""
        return self.rep * self.width, self.width, self.value

    def sizes(self, tensors: int) -> list[int]:
        """Numbers of outputs of three projections, or of one fused projection."""
        outputs = [self.groups * s for s in self.spans]
        return outputs if tensors == 3 else [sum(outputs)]

    def places(self, tensors: int, blocks: bool) -> list[Tensor]:
        """Positions of the groups in the outputs of each of three projections, or of one fused projection."""
        spans = self.spans
        if tensors == 3:
            return [span(self.groups, s) for s in spans]
        if not blocks:
            return [span(self.groups, sum(spans))]
        starts = (0, self.groups * spans[0], self.groups * (spans[0] + spans[1]))
        return [offsets(span(self.groups, s, start) for s, start in zip(spans, starts, strict=True))]


def attention_groups(path: str, owner: nn.Module) -> list[PruningGroup]:
    """The group of an attention module; empty if no pattern matches.

    Kind ``head`` if queries, keys and values have the same number of heads, else ``kv_group``: one key and value head with the
    query heads that read it. Not exact if a norm reduces over the heads. Raises UnclearError if the module is not understood.
    """
    if type(owner) in (nn.MultiheadAttention, OpenAttention):
        return [_torch_group(path, owner)]  # type: ignore[arg-type]
    for names, outputs in SEPARATE:
        for output in outputs:
            if has(owner, *names, output):
                return [_attention_group(path, owner, [*names, output])]
    for name, output, blocks in FUSED:
        if has(owner, name, output):
            return [_attention_group(path, owner, [name, output], blocks)]
    return []


def _torch_group(path: str, owner: nn.MultiheadAttention) -> PruningGroup:
    """The heads of torch's own attention module, whose input projection is one tensor, or three where widths differ."""
    out, n = Projection.of(path, owner, "out_proj"), owner.num_heads
    width = out.inputs // n
    heads = _Heads(n, 1, width, width)
    names = ("in_proj_weight",) if owner.in_proj_weight is not None else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    if set(owner._parameters) - {
        "in_proj_weight",
        "in_proj_bias",
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "bias_k",
        "bias_v",
    }:
        raise UnclearError("its weights are computed from other tensors")
    blocks = heads.places(1, True)[0]
    pieces = [GroupSlice(path, name, 0, at, "producer") for name, at in zip(names, heads.places(len(names), True), strict=True)]
    pieces += [GroupSlice(path, "in_proj_bias", 0, blocks, "producer")] if owner.in_proj_bias is not None else []
    pieces += [
        GroupSlice(path, name, 2, span(n, width), "tied") for name in ("bias_k", "bias_v") if getattr(owner, name) is not None
    ]
    counts = (StoredCount(path, "num_heads", 1),)
    return PruningGroup(path, "head", n, (*pieces, *out.consumers(span(n, width))), counts, attention_macs=2 * width)


def _attention_group(path: str, owner: nn.Module, names: list[str], blocks: bool = True) -> PruningGroup:
    *inputs, out = [Projection.of(path, owner, name) for name in names]
    inner = names[0].rpartition(".")[0]  # in BERT a submodule holds everything but the output projection
    holder: Any = child(owner, inner) if inner else owner
    holder_path = join(path, inner)
    if names[0] == "c_attn" and not inputs[0].transposed:
        raise UnclearError("c_attn is a Linear: the order of its heads depends on an option of GPT-BigCode")
    heads = _heads(holder, inputs, out)
    tied, exact = _tied_parameters(holder_path, holder, {name.rpartition(".")[2] for name in names}, heads)
    producers = [c for part, place in zip(inputs, heads.places(len(inputs), blocks), strict=True) for c in part.producers(place)]
    return PruningGroup(
        path,
        "head" if heads.rep == 1 else "kv_group",
        heads.groups,
        (*producers, *tied, *out.consumers(span(heads.groups, heads.rep * heads.value))),
        _stored_counts(holder_path, holder, heads),
        exact,
        attention_macs=heads.rep * (heads.width + heads.value),
    )


def _heads(holder: Any, inputs: list[Projection], out: Projection) -> _Heads:
    """Numbers and dimensions of the heads, from the head dimension that the module stores and the shapes of its weights."""
    used = _code(holder).co_varnames  # arguments and local variables of the forward method
    for argument in _PER_HEAD_ARGUMENTS:
        if argument in used and getattr(getattr(holder, "config", None), argument, True):
            raise UnclearError(f"reads {argument}, which another module computes for every head")
    if "embed_dim" in used:
        raise UnclearError("assumes that its input is as wide as all heads together")
    width = next((w for name in _WIDTH if isinstance(w := getattr(holder, name, None), int)), 0)
    if width < 1:
        raise UnclearError(f"stores no head dimension: it has none of {', '.join(_WIDTH)}")
    sizes = [part.outputs for part in inputs]
    if len(inputs) == 3:
        queries, groups = sizes[0] // width, sizes[1] // width
        value = sizes[2] // max(1, groups)
    else:
        queries, value = out.inputs // width, width
        groups = (sizes[0] // width - queries) // 2
    heads = _Heads(groups, queries // max(1, groups), width, value)
    if groups < 1 or sizes != heads.sizes(len(inputs)) or out.inputs != groups * heads.rep * value:
        shapes = ", ".join(f"{part.path.rpartition('.')[2]} has {part.outputs} outputs" for part in inputs)
        raise UnclearError(f"heads of dimension {width} do not fit: {shapes}, the output projection has {out.inputs} inputs")
    return heads


def _tied_parameters(path: str, holder: nn.Module, used: set[str], heads: _Heads) -> tuple[list[GroupSlice], bool]:
    """Slices of the module's parameters outside its projections, and whether no norm reduces over the heads.

    Raises UnclearError for anything but norms and tensors with one entry per query head.
    """
    queries, slices, exact = heads.groups * heads.rep, [], True
    for name, tensor in holder.named_parameters(recurse=False):
        dims = [dim for dim, size in enumerate(tensor.shape) if size == queries]
        if len(dims) != 1 or (queries == heads.width and "sink" not in name):  # DiffLlama's have one entry per dimension
            raise UnclearError(f"has the parameter {name} {tuple(tensor.shape)} outside its projections")
        slices.append(GroupSlice(path, name, dims[0], span(heads.groups, heads.rep), "tied"))
    counts = {queries: heads.rep, heads.groups: 1}
    by_head = {(n, heads.width): s for n, s in counts.items()}
    over_all = {(n * w,): s * w for n, s in counts.items() for w in (heads.width, heads.value)}
    for name, norm in holder.named_children():
        for part, tensor in norm.named_parameters() if name not in used else ():
            shape, leaf = tuple(tensor.shape), "." not in part
            if leaf and shape == (heads.width,):
                continue  # shared by all heads
            if not leaf or shape not in by_head | over_all:
                raise UnclearError(f"has the parameter {name}.{part} {shape} outside its projections")
            slices.append(GroupSlice(join(path, name), part, 0, span(heads.groups, (by_head | over_all)[shape]), "tied"))
            exact &= shape in by_head and not hasattr(norm, "normalized_shape")
    return slices, exact


def _stored_counts(path: str, holder: Any, heads: _Heads) -> tuple[StoredCount, ...]:
    """The counts and widths that the module stores, and those of its config if its forward reads them there."""
    queries = heads.groups * heads.rep
    numbers = dict.fromkeys(_QUERIES, (queries, heads.rep)) | dict.fromkeys(_GROUPS, (heads.groups, 1))
    numbers |= dict.fromkeys(_CHANNELS, (queries * heads.width, heads.rep * heads.width))
    read = set(_code(holder).co_names)
    if "config" in read and any(name in read and not hasattr(holder, name) for name in _IN_CONFIG):
        numbers |= {f"config.{name}": numbers[name] for name in _IN_CONFIG}
    return tuple(StoredCount(path, name, step) for name, (now, step) in numbers.items() if attribute(holder, name) == now)


def _code(holder: nn.Module) -> Any:
    """The code object of a module's forward, for the names that it uses. Raises UnclearError if it has none."""
    code = getattr(inspect.unwrap(type(holder).forward), "__code__", None)
    if code is None:
        raise UnclearError("has a forward method without Python code")
    return code
