"""What goes together when units are removed: slices through tensors, and groups made of them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

Role = Literal["producer", "consumer", "tied"]
KINDS = ("channel", "ffn", "head", "kv_group", "moe_ffn", "expert")


@dataclass(frozen=True, eq=False)
class GroupSlice:
    """Where a group's units lie in one dimension of one tensor.

    module: the path of the module that holds it, "" for the model itself; tensor: its name there, such as ``weight``.
    index (units, span) int64: the places of each unit along ``dim``. role: ``producer`` (rows that make the unit),
    ``consumer`` (columns that read it), ``tied`` (a norm's parameters, a depthwise filter, a per-head entry).
    reads (units, places): where the unit lies in the consumer's input, where that is not ``index`` (a grouped convolution).
    entry: the expert that is cut, of a tensor that has one a row in dimension 0; ``dim`` counts from the whole tensor.
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
        """(units, places) in a consumer's input."""
        return self.index if self.reads is None else self.reads

    def of(self, model: nn.Module) -> Tensor:
        """The tensor itself; of an expert its own part."""
        tensor = getattr(model.get_submodule(self.module), self.tensor).detach()
        return tensor if self.entry is None else tensor[self.entry]

    def by_unit(self, model: nn.Module) -> Tensor:
        """The unit's entries, (units, the rest)."""
        tensor = self.of(model)
        moved = tensor.movedim(self.dim - (self.entry is not None), 0)
        return moved[self.index.to(tensor.device)].flatten(1)


@dataclass(frozen=True)
class Patch:
    """A number that a module keeps beside its tensors and that falls by ``step`` with each removed unit.

    attribute: its name; ``config.x`` is the field of a config, of which the module and its parts then have a copy of their own.
    among: groups that the number belongs to together; it falls only where all of them lose as many units.
    """

    module: str
    attribute: str
    step: int
    among: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class PruningGroup:
    """Units that can be removed one by one, and all that has to go with each.

    name: its own in the model; kind: one of ``KINDS``. exact: whether a slice gives what a mask gives (no norm reduces over
    the group). together: groups of this name keep the same number of units (experts of a layer). multiple: of which the kept number
    has to be one. attention: multiplications a unit and pair of positions beside those of its tensors. router: the module that
    chooses units for each token, where these are whole experts; least: how many have to stay.
    """

    name: str
    kind: str
    n: int
    slices: tuple[GroupSlice, ...]
    patches: tuple[Patch, ...] = ()
    exact: bool = True
    together: str | None = None
    multiple: int = 1
    attention: int = 0
    router: str | None = None
    least: int = 1

    def by_role(self, *roles: Role) -> list[GroupSlice]:
        return [piece for piece in self.slices if piece.role in roles]

    @property
    def gated(self) -> bool:
        """Whether each consumer is a module of its own, at whose input a unit can be seen and shut off."""
        return self.router is None and all(piece.entry is None for piece in self.by_role("consumer"))

    def describe(self) -> str:
        """What makes and what reads the units, such as ``layer1.0: conv1 > conv2``: what all share of a path stands once."""
        makes, reads = (
            list(dict.fromkeys(_spoken(piece) for piece in self.by_role(role) if piece.tensor != "bias"))
            for role in ("producer", "consumer")
        )
        if self.router is not None:
            makes, reads = [self.router], [self.name]
        shared = 0
        for parts in zip(*(name.split(".")[:-1] for name in (*makes, *reads)), strict=False):
            if len(set(parts)) > 1:
                break
            shared += 1
        ends = [", ".join(".".join(name.split(".")[shared:]) for name in names) for names in (makes, reads)]
        prefix = ".".join(makes[0].split(".")[:shared]) + ": " if shared else ""
        return f"{prefix}{ends[0]} > {ends[1]}"


def _spoken(piece: GroupSlice) -> str:
    """A layer by its path; a tensor of another name by its own."""
    return piece.module if piece.tensor == "weight" and piece.module else piece.name


@dataclass(frozen=True)
class Frozen:
    """What is not pruned, and why."""

    what: str
    reason: str


@dataclass(frozen=True)
class PruningGroups(Sequence[PruningGroup]):
    """The groups of a model, in order, and the report of what was left out.

    apart: groups across others, which are taken only where a scope asks for them: whole experts, whose channels are groups, too.
    """

    groups: tuple[PruningGroup, ...]
    frozen: tuple[Frozen, ...] = field(default=())
    apart: tuple[PruningGroup, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, k: int) -> PruningGroup:
        return self.groups[k]

    def __iter__(self) -> Iterator[PruningGroup]:
        return iter(self.groups)

    def named(self, name: str) -> PruningGroup:
        """Raises ValueError for a name that no group has."""
        found = next((group for group in (*self.groups, *self.apart) if group.name == name), None)
        if found is None:
            raise ValueError(f"there is no group {name!r}; the model has {shown([a.name for a in self.groups])}")
        return found

    def chosen(self, scope: str | Sequence[str] = "*", freeze: str | Sequence[str] = (), inexact: bool = False) -> "PruningGroups":
        """The groups that a scope names, by name, pattern or kind, without frozen and, unless asked for, inexact ones.

        PruningGroups apart are taken by their kind, ``expert``, their name, or a pattern that fits no other
        group: ``*`` leaves them out.
        Raises ValueError where a word of the scope or of ``freeze`` matches nothing, no group is left, or both experts and their
        channels are.
        """
        wanted, shut = self._matched(scope, "scope"), self._matched(freeze, "freeze", across=True)
        kept, report = [], list(self.frozen)
        for group in (*self.groups, *self.apart):
            if group.name not in wanted:
                continue
            if group.name in shut:
                report.append(Frozen(group.name, "named by freeze"))
            elif not group.exact and not inexact:
                report.append(Frozen(group.name, "inexact: a norm reduces over its units (inexact=true takes it)"))
            else:
                kept.append(group)
        if not kept:
            why = "; ".join(f"{f.what}: {f.reason}" for f in report[:6]) or "the model has none"
            raise ValueError(f"scope {scope!r} leaves no group to prune: {why}")
        both = sorted({group.together or "" for group in kept} & {group.name for group in kept if group.router is not None})
        if both:
            raise ValueError(f"scope {scope!r} takes both the experts of {both[0]} and their channels: prune one, then the other")
        return PruningGroups(tuple(kept), tuple(report))

    def coverage(self, model: nn.Module) -> float:
        """The share of the parameters that lie in some group's slices."""
        piece = {(c.module, c.tensor) for group in self.groups for c in group.slices}
        parameters = {id(p): p.numel() for p in model.parameters()}
        inside = {id(getattr(model.get_submodule(m), t)) for m, t in piece}
        return sum(n for key, n in parameters.items() if key in inside) / max(1, sum(parameters.values()))

    def _matched(self, patterns: str | Sequence[str], what: str, across: bool = False) -> set[str]:
        found: set[str] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            names = {a.name for a in self.groups if pattern in (a.name, a.kind) or fnmatchcase(a.name, pattern)}
            loose = across or not names
            names |= {a.name for a in self.apart if pattern in (a.name, a.kind) or (loose and fnmatchcase(a.name, pattern))}
            if not names and len(self.groups):
                kinds = shown(sorted({a.kind for a in (*self.groups, *self.apart)}))
                raise ValueError(
                    f"{what} {pattern!r} matches no group; there are {shown([a.name for a in self.groups])}, of the kinds {kinds}"
                )
            found |= names
        return found


def identity(n: int) -> Tensor:
    """A unit a place, (n, 1)."""
    return torch.arange(n)[:, None]


def span(n: int, width: int, start: int = 0) -> Tensor:
    """``width`` neighbouring places a unit, from ``start``, (n, width)."""
    return start + torch.arange(n * width).reshape(n, width)


def offsets(parts: Iterable[Tensor]) -> Tensor:
    """The same units in several blocks of one tensor, (n, the sum of their spans)."""
    return torch.cat(list(parts), 1)


def shown(names: Sequence[str], most: int = 12) -> str:
    """Names in a line."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "") if names else "none"
