"""Attention: heads, or groups of query heads that share keys and values, as units."""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nodelens.network.architecture import UnclearError
from nodelens.network.groups import GroupSlice, Patch, PruningGroup, offsets, span

from .projections import Projection, child, has, join

SEPARATE = (  # queries, keys, values; how the output may be called
    (("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj", "dense", "Wo")),
    (("self.query", "self.key", "self.value"), ("output.dense",)),
    (("attention.query", "attention.key", "attention.value"), ("output.dense",)),
    (("q_lin", "k_lin", "v_lin"), ("out_lin",)),
)
FUSED = (  # the three in one; the output; whether they follow each other as blocks, else group by group
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
_OUTSIDE = ("alibi", "position_bias", "shared_kv_states")  # arguments with an entry a head


@dataclass(frozen=True)
class _Heads:
    """Groups, each of ``rep`` query heads and one head of keys, all ``width`` numbers, and one of values, ``value`` numbers."""

    groups: int
    rep: int
    width: int
    value: int

    @property
    def spans(self) -> tuple[int, int, int]:
        """Numbers of a group: queries, keys, values."""
        return self.rep * self.width, self.width, self.value

    def sizes(self, tensors: int) -> list[int]:
        """Outputs of three projections, or of one that makes all."""
        whole = [self.groups * s for s in self.spans]
        return whole if tensors == 3 else [sum(whole)]

    def places(self, tensors: int, blocks: bool) -> list[Tensor]:
        """Where the groups lie in the outputs of each projection: of three, or of one that makes all."""
        spans = self.spans
        if tensors == 3:
            return [span(self.groups, s) for s in spans]
        if not blocks:
            return [span(self.groups, sum(spans))]
        starts = (0, self.groups * spans[0], self.groups * (spans[0] + spans[1]))
        return [offsets(span(self.groups, s, start) for s, start in zip(spans, starts, strict=True))]


def attention_axes(path: str, owner: nn.Module) -> list[PruningGroup]:
    """The group of an attention module; empty where no pattern matches.

    Kind ``head`` where queries, keys and values have as many heads; else ``kv_group``: a head of keys and values and all
    query heads that read it. Inexact where a norm reduces over the heads. Raises UnclearError where it is not understood.
    """
    for names, outputs in SEPARATE:
        for output in outputs:
            if has(owner, *names, output):
                return [_axis(path, owner, [*names, output])]
    for name, output, blocks in FUSED:
        if has(owner, name, output):
            return [_axis(path, owner, [name, output], blocks)]
    return []


def _axis(path: str, owner: nn.Module, names: list[str], blocks: bool = True) -> PruningGroup:
    *made, out = [Projection.of(path, owner, name) for name in names]
    inner = names[0].rpartition(".")[0]  # BERT keeps all but the output in a module of its own
    holder: Any = child(owner, inner) if inner else owner
    held = join(path, inner)
    if names[0] == "c_attn" and not made[0].transposed:
        raise UnclearError("c_attn is a Linear: GPT-BigCode's order of heads in it depends on an option")
    heads = _heads(holder, made, out)
    tied, exact = _beside(held, holder, {name.rpartition(".")[2] for name in names}, heads)
    producers = [c for part, place in zip(made, heads.places(len(made), blocks), strict=True) for c in part.makes(place)]
    return PruningGroup(
        path,
        "head" if heads.rep == 1 else "kv_group",
        heads.groups,
        (*producers, *tied, out.reads(span(heads.groups, heads.rep * heads.value))),
        _patches(held, holder, heads),
        exact,
        attention=heads.rep * (heads.width + heads.value),
    )


def _heads(holder: Any, made: list[Projection], out: Projection) -> _Heads:
    """Counts and widths of the heads, from the width that the module keeps and the shapes of its weights."""
    used = _code(holder).co_varnames  # its arguments and its own names
    for argument in _OUTSIDE:
        if argument in used and getattr(getattr(holder, "config", None), argument, True):
            raise UnclearError(f"reads {argument}, which another module makes for every head")
    if "embed_dim" in used:
        raise UnclearError("takes the width of its input for that of all heads")
    width = next((w for name in _WIDTH if isinstance(w := getattr(holder, name, None), int)), 0)
    if width < 1:
        raise UnclearError(f"keeps no width of a head: none of {', '.join(_WIDTH)}")
    sizes = [part.outputs for part in made]
    if len(made) == 3:
        queries, groups = sizes[0] // width, sizes[1] // width
        value = sizes[2] // max(1, groups)
    else:
        queries, value = out.inputs // width, width
        groups = (sizes[0] // width - queries) // 2
    heads = _Heads(groups, queries // max(1, groups), width, value)
    if groups < 1 or sizes != heads.sizes(len(made)) or out.inputs != groups * heads.rep * value:
        shapes = ", ".join(f"{part.path.rpartition('.')[2]} makes {part.outputs}" for part in made)
        raise UnclearError(f"heads of {width} do not fit: {shapes}, the output reads {out.inputs}")
    return heads


def _beside(path: str, holder: nn.Module, used: set[str], heads: _Heads) -> tuple[list[GroupSlice], bool]:
    """Cuts of what an attention module holds beside its projections, and whether no norm reduces over the heads.

    Raises UnclearError for anything but norms and tensors with an entry a query head.
    """
    queries, slices, exact = heads.groups * heads.rep, [], True
    for name, tensor in holder.named_parameters(recurse=False):
        dims = [dim for dim, size in enumerate(tensor.shape) if size == queries]
        if len(dims) != 1 or (queries == heads.width and "sink" not in name):  # DiffLlama's are as long as a head is wide
            raise UnclearError(f"holds {name} {tuple(tensor.shape)} beside its projections")
        slices.append(GroupSlice(path, name, dims[0], span(heads.groups, heads.rep), "tied"))
    counts = {queries: heads.rep, heads.groups: 1}
    by_head = {(n, heads.width): s for n, s in counts.items()}
    over_all = {(n * w,): s * w for n, s in counts.items() for w in (heads.width, heads.value)}
    for name, norm in holder.named_children():
        for part, tensor in norm.named_parameters() if name not in used else ():
            shape, leaf = tuple(tensor.shape), "." not in part
            if leaf and shape == (heads.width,):
                continue  # the same for every head
            if not leaf or shape not in by_head | over_all:
                raise UnclearError(f"holds {name}.{part} {shape} beside its projections")
            slices.append(GroupSlice(join(path, name), part, 0, span(heads.groups, (by_head | over_all)[shape]), "tied"))
            exact &= shape in by_head and not hasattr(norm, "normalized_shape")
    return slices, exact


def _patches(path: str, holder: Any, heads: _Heads) -> tuple[Patch, ...]:
    """The counts and widths that the module keeps; those of its config where its forward reads them there."""
    queries = heads.groups * heads.rep
    numbers = dict.fromkeys(_QUERIES, (queries, heads.rep)) | dict.fromkeys(_GROUPS, (heads.groups, 1))
    numbers |= dict.fromkeys(_CHANNELS, (queries * heads.width, heads.rep * heads.width))
    read = set(_code(holder).co_names)
    if "config" in read and any(name in read and not hasattr(holder, name) for name in _IN_CONFIG):
        numbers |= {f"config.{name}": numbers[name] for name in _IN_CONFIG}
    return tuple(Patch(path, name, step) for name, (now, step) in numbers.items() if _number(holder, name) == now)


def _code(holder: nn.Module) -> Any:
    """The code of a module's forward, for the names that it uses. Raises UnclearError where it is not Python's."""
    code = getattr(inspect.unwrap(type(holder).forward), "__code__", None)
    if code is None:
        raise UnclearError("has a forward that cannot be read")
    return code


def _number(holder: Any, name: str) -> Any:
    for part in name.split("."):
        holder = getattr(holder, part, None)
    return holder
