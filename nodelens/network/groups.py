"""Pruning groups: units that are coupled through the network, and the slices of tensors that belong to each unit."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from nodelens.messages import check_texts, listed, setting

from .sharded import full

Role = Literal["producer", "consumer", "tied"]


@dataclass(frozen=True, eq=False)
class GroupSlice:
    """Where the units of a group lie along one dimension of one tensor.

    module: path of the module that holds the tensor, "" for the model itself; tensor: its attribute name, such as ``weight``.
    index (units, span) int64: positions of each unit along ``dim``. role: ``producer`` (rows that compute the unit),
    ``consumer`` (columns that read it), ``tied`` (parameters of a norm, depthwise filters, entries per head).
    reads (units, places): positions of the unit in the consumer's input where they differ from ``index`` (grouped convolutions).
    entry: the expert, where dimension 0 of the tensor holds one row per expert; ``dim`` counts dimension 0 as well.
    """

    module: str
    tensor: str
    dim: int
    index: Tensor
    role: Role
    reads: Tensor | None = None
    entry: int | None = None

    @property
    def name(self) -> str:
        return f"{self.module}.{self.tensor}" if self.module else self.tensor

    @property
    def places(self) -> Tensor:
        """Positions of each unit in the consumer's input, (units, places)."""
        return self.index if self.reads is None else self.reads

    def of(self, model: nn.Module) -> Tensor:
        """The tensor, or the expert's part of it. Collective for a sharded model, whose tensor is gathered."""
        tensor = full(getattr(model.get_submodule(self.module), self.tensor).detach())
        return tensor if self.entry is None else tensor[self.entry]

    def ndim(self, model: nn.Module) -> int:
        """The number of axes of ``of``."""
        return getattr(model.get_submodule(self.module), self.tensor).ndim - (self.entry is not None)

    def by_unit(self, model: nn.Module) -> Tensor:
        """The entries of each unit, flattened, (units, entries): a view of the tensor where that is possible."""
        tensor = self.of(model)
        moved = tensor.movedim(self.dim - (self.entry is not None), 0)
        if self.index.shape == (len(moved), 1) and self.index.equal(identity(len(moved))):
            return moved.reshape(len(moved), -1)
        return moved[self.index.to(tensor.device)].flatten(1)


@dataclass(frozen=True)
class StoredCount:
    """An integer attribute of a module that decreases by ``step`` with every removed unit, such as ``num_heads``.

    attribute: its name; ``config.x`` is a field of the module's config, which is copied before it is changed.
    among: names of groups; where it is given, the attribute changes only if all of them lose the same number of units.
    """

    module: str
    attribute: str
    step: int
    among: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class PruningGroup:
    """Units that can be removed one by one, and the slices of tensors that are removed with each.

    name: unique in the model. kind: channel, ffn, head, kv_group, moe_ffn or expert. exact: whether slicing and masking give the
    same output; they do unless a norm reduces over the group. equal_count: groups with the same label keep the same number of
    units (experts of one layer). multiple: the number of kept units is a multiple of this. attention_macs: multiply-accumulates
    per unit and pair of positions in attention, beyond those of the tensors; product_macs: per unit and sample, of products of
    activations in the graph. router: the module that routes tokens, where the units are whole experts. min_keep: the smallest
    number of units that can stay.
    """

    name: str
    kind: str
    n: int
    slices: tuple[GroupSlice, ...]
    counts: tuple[StoredCount, ...] = ()
    exact: bool = True
    equal_count: str | None = None
    multiple: int = 1
    attention_macs: int = 0
    product_macs: float = 0.0
    router: str | None = None
    min_keep: int = 1

    def by_role(self, *roles: Role) -> list[GroupSlice]:
        return [piece for piece in self.slices if piece.role in roles]

    @property
    def gated(self) -> bool:
        """Whether every consumer is a module of its own, so that units can be observed and masked at its input."""
        return self.router is None and all(piece.entry is None for piece in self.by_role("consumer"))

    def describe(self) -> str:
        """Producers and consumers, such as ``layer1.0: conv1 > conv2``; the common part of their paths is named once."""
        producers, consumers = (
            list(dict.fromkeys(_label(piece) for piece in self.by_role(role) if piece.tensor != "bias"))
            for role in ("producer", "consumer")
        )
        if self.router is not None:
            producers, consumers = [self.router], [self.name]
        shared = 0
        for parts in zip(*(name.split(".")[:-1] for name in (*producers, *consumers)), strict=False):
            if len(set(parts)) > 1:
                break
            shared += 1
        ends = [", ".join(".".join(name.split(".")[shared:]) for name in names) for names in (producers, consumers)]
        prefix = ".".join(producers[0].split(".")[:shared]) + ": " if shared else ""
        return f"{prefix}{ends[0]} > {ends[1]}"


def _label(piece: GroupSlice) -> str:
    """The module's path for a ``weight``, else the path of the tensor."""
    return piece.module if piece.tensor == "weight" and piece.module else piece.name


@dataclass(frozen=True)
class Frozen:
    """A part of the model that is not pruned, and the reason."""

    what: str
    reason: str


@dataclass(frozen=True)
class PruningGroups(Sequence[PruningGroup]):
    """The pruning groups of a model, in order, and what is frozen.

    opt_in: groups that overlap others and are chosen only where a scope names them: whole experts, whose channels are groups too.
    """

    groups: tuple[PruningGroup, ...]
    frozen: tuple[Frozen, ...] = field(default=())
    opt_in: tuple[PruningGroup, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, k: int) -> PruningGroup:
        return self.groups[k]

    def __iter__(self) -> Iterator[PruningGroup]:
        return iter(self.groups)

    def named(self, name: str) -> PruningGroup:
        """The group of that name. Raises ValueError if there is none."""
        group = next((group for group in (*self.groups, *self.opt_in) if group.name == name), None)
        if group is None:
            raise ValueError(f"there is no group {name!r}; the model has {listed([g.name for g in self.groups])}")
        return group

    def chosen(
        self, scope: str | Sequence[str] = "*", freeze: str | Sequence[str] = (), allow_approximate: bool = False
    ) -> "PruningGroups":
        """The groups in scope, by name, pattern or kind, without those that ``freeze`` names.

        Groups over which a norm reduces are included only with ``allow_approximate``. An ``opt_in`` group is included where the
        scope gives its kind (``expert``), its name, or a pattern that matches no other group; ``*`` leaves it out.
        Raises ValueError if a word of ``scope`` or ``freeze`` matches nothing, if no group is left, or if both whole experts and
        their channels are in scope.
        """
        in_scope, excluded = self.matching(scope, "scope"), self.matching(freeze, "freeze", with_opt_in=True)
        kept, report = [], list(self.frozen)
        for group in (*self.groups, *self.opt_in):
            if group.name not in in_scope:
                continue
            if group.name in excluded:
                report.append(Frozen(group.name, "named by freeze"))
            elif not group.exact and not allow_approximate:
                way = setting("allow_approximate", True)
                report.append(Frozen(group.name, f"a norm reduces over its units; {way} includes it"))
            else:
                kept.append(group)
        if not kept:
            why = "; ".join(f"{f.what}: {f.reason}" for f in report[:6]) or "the model has none"
            raise ValueError(f"scope {scope!r} leaves no group to prune: {why}")
        both = sorted({group.equal_count or "" for group in kept} & {group.name for group in kept if group.router is not None})
        if both:
            raise ValueError(f"scope {scope!r} takes both the experts of {both[0]} and their channels: prune one, then the other")
        return PruningGroups(tuple(kept), tuple(report))

    def coverage(self, model: nn.Module) -> float:
        """The share of the model's parameters in tensors that some group slices."""
        sliced = {(piece.module, piece.tensor) for group in self.groups for piece in group.slices}
        parameters = {id(p): p.numel() for p in model.parameters()}
        inside = {id(getattr(model.get_submodule(m), t)) for m, t in sliced}
        return sum(n for key, n in parameters.items() if key in inside) / max(1, sum(parameters.values()))

    def matching(self, patterns: str | Sequence[str], option: str, with_opt_in: bool = False) -> set[str]:
        """Names of the groups that match, by name, pattern or kind. Raises ValueError, naming the option, if none does."""
        check_texts(option, patterns, "'fc1', 'layer1.*' or 'head'")
        matched: set[str] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            names = {g.name for g in self.groups if pattern in (g.name, g.kind) or fnmatchcase(g.name, pattern)}
            loose = with_opt_in or not names
            names |= {g.name for g in self.opt_in if pattern in (g.name, g.kind) or (loose and fnmatchcase(g.name, pattern))}
            if not names and len(self.groups):
                known, kinds = [g.name for g in self.groups], sorted({g.kind for g in (*self.groups, *self.opt_in)})
                raise ValueError(f"{option} {pattern!r} matches no group; there are {listed(known)}, of the kinds {listed(kinds)}")
            matched |= names
        return matched


def identity(n: int) -> Tensor:
    """One position per unit, (n, 1)."""
    return torch.arange(n)[:, None]


def span(n: int, width: int, start: int = 0) -> Tensor:
    """``width`` consecutive positions per unit, from ``start`` on, (n, width)."""
    return start + torch.arange(n * width).reshape(n, width)


def offsets(parts: Iterable[Tensor]) -> Tensor:
    """Positions of the same units in several blocks of one tensor, (n, sum of the spans)."""
    return torch.cat(list(parts), 1)
