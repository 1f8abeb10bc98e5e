"""Channel ids: which channels are tied, which are frozen, and the pruning groups that result."""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor

from nodelens.network.groups import Frozen, GroupSlice, PruningGroup, PruningGroups, Role, StoredCount

WIDTH = re.compile(r"dim|size|width|channel|planes|feature|embed|ch_per|_chs?$|chans")  # in the names of attributes that are widths
Profile = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Place:
    """The channels along one dimension of one tensor, ids (length,).

    groups: how often the ids repeat in the input of a grouped convolution.
    is_count: the attribute is not a tensor but an integer of the module, which decreases by one with each channel.
    """

    module: str
    tensor: str
    dim: int
    ids: Tensor
    role: Role
    groups: int = 1
    is_count: bool = False


@dataclass(frozen=True, eq=False)
class Product:
    """A dimension that is laid out as a product of dimensions, such as (heads, dimensions per head).

    whole (n_1, n_2, ...): the ids of its entries. factors: the ids along each of the dimensions, (n_1,), (n_2,), ...
    The entries that stay must form a product, too: units are removed along one of the factors, and the others are frozen.
    numbers: integer attributes of the module that reshapes, which may hold the sizes.
    """

    whole: Tensor
    factors: tuple[Tensor, ...]
    module: str = ""
    numbers: Mapping[str, int] = field(default_factory=dict)

    def along(self, k: int) -> tuple[Tensor, Tensor]:
        """The ties of the entries to a factor."""
        shape = [-1 if j == k else 1 for j in range(self.whole.ndim)]
        return self.whole.flatten(), self.factors[k].reshape(shape).expand_as(self.whole).flatten()


@dataclass
class Ids:
    """One id per channel, the ties between ids, the places of the ids in tensors, and what freezes them."""

    count: int = 0
    places: dict[tuple[str, str, int], Place] = field(default_factory=dict)
    ties: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    normalized: list[Tensor] = field(default_factory=list)  # an operation reduces over them
    heads: list[Tensor] = field(default_factory=list)  # the operands of a matrix product share them
    multiplied: list[tuple[Tensor, float]] = field(default_factory=list)  # ids of heads, multiply-accumulates of each per sample
    products: list[Product] = field(default_factory=list)
    summed: list[tuple[Tensor, str, str]] = field(default_factory=list)  # ids, reason and module of a product of activations
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # outputs (n,) in order and inputs (m,) of each layer
    report: list[Frozen] = field(default_factory=list)  # what is frozen as a whole
    evaluated: frozenset[tuple[str, str, int]] | None = None  # places of the evaluation, while training is followed

    def fresh(self, length: int) -> Tensor:
        """New ids, (length,)."""
        self.count += length
        return torch.arange(self.count - length, self.count)

    def copy(self) -> "Ids":
        """Ids to which more can be added without changing these."""
        mutable = {f.name: copy.copy(getattr(self, f.name)) for f in fields(self)}
        return Ids(**mutable)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Channels that are removed together: a[k] with b[k]."""
        if a is not b:
            self.ties.append((a, b))

    def freeze(self, ids: Tensor, reason: str) -> None:
        """Channels that cannot be removed. The first of several reasons is reported."""
        self.frozen.append((ids, reason))

    def put(self, place: Place, computed: bool = False) -> None:
        """Records where channels lie; if a tensor is used twice, the channels of both uses are tied.

        computed: a layer uses what is computed from the tensor, such as standardized weights, which was seen as data before.

        Layers that only training runs do not read or make units that can be measured: their inputs are tied to the units that
        they read, and their outputs are frozen.
        """
        if self.evaluated is not None and (place.module, place.tensor, place.dim) not in self.evaluated:
            if place.role == "producer":
                self.freeze(place.ids, f"only training runs {place.module}")
            place = replace(place, role="producer" if place.role == "producer" else "tied")
        key = (place.module, place.tensor, place.dim)
        first = self.places.setdefault(key, place)
        if computed and first.role == "tied":
            first = self.places[key] = replace(first, role=place.role, groups=place.groups)
        if (first.role, first.groups, len(first.ids)) == (place.role, place.groups, len(place.ids)):
            self.tie(first.ids, place.ids)
            return
        if place.tensor == "bias" and len(first.ids) == len(place.ids):  # each entry belongs to one unit, whatever reads it
            self.places[key] = first if place.role == "tied" else place
            self.tie(first.ids, place.ids)
            return
        as_data = first.role != place.role and "tied" in (first.role, place.role)
        name = f"{place.tensor} of {place.module or 'the model'}"
        for ids in (first.ids, place.ids):
            self.freeze(ids, f"the {name} is also read outside its layer" if as_data else f"{name} is used in two ways")

    def groups(self) -> PruningGroups:
        """Tied channels form one unit; units with equally many places in the same tensors form one group."""
        label, places = joined(self.count, self.ties), list(self.places.values())
        units, reasons = _Units.of(places, label), self._reasons(label)
        alike: dict[int, list[int]] = {}
        roles = [{places[place].role for place, _ in profile} for profile in units.profiles]
        for k, (unit, profile) in enumerate(zip(units.ids, units.which, strict=True)):
            if unit not in reasons and "producer" in roles[profile]:
                if "consumer" in roles[profile]:
                    alike.setdefault(profile, []).append(k)
                else:
                    reasons[unit] = "no layer reads them"
        normalized, heads = (set(label[torch.cat(marks)].tolist()) if marks else set() for marks in (self.normalized, self.heads))
        macs = self._macs(label)
        groups = []
        for profile, members in alike.items():
            own = {units.ids[k] for k in members}
            starts = units.starts[members]
            group = _group(places, units.profiles[profile], starts, units.positions, normalized.isdisjoint(own))
            several = any(piece.index.shape[1] > 1 for piece in group.by_role("producer"))
            group = replace(group, product_macs=macs.get(units.ids[members[0]], 0.0))
            groups.append(group if heads.isdisjoint(own) or not several else replace(group, kind="head"))
        order = {name: k for k, name in enumerate(dict.fromkeys(p.module for p in places if p.role == "producer"))}
        groups.sort(key=lambda group: (order[group.name], int(group.slices[0].index.min())))
        return PruningGroups(tuple(_named(groups)), (*_report(places, units, reasons), *self.report))

    def _macs(self, label: Tensor) -> dict[int, float]:
        """{unit: multiply-accumulates per sample in products of activations}."""
        macs: dict[int, float] = {}
        for ids, each in self.multiplied:
            for unit in label[ids].tolist():
                macs[unit] = macs.get(unit, 0.0) + each
        return macs

    def _reasons(self, label: Tensor) -> dict[int, str]:
        reasons: dict[int, str] = {}
        for ids, reason in self.frozen:
            for unit in label[ids].unique().tolist():
                reasons.setdefault(unit, reason)
        return reasons


def joined(count: int, ties: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The lowest id that each id is tied to, directly or not, (count,): union-find in a few passes over all ties at once."""
    pairs = list(ties)
    label = torch.arange(count)
    if not pairs:
        return label
    a, b = (torch.cat(side) for side in zip(*pairs, strict=True))
    while True:
        low = torch.minimum(label[a], label[b])
        new = label
        for end in (a, b, label[a], label[b]):  # both ends of each tie, and their current roots
            new = new.scatter_reduce(0, end, low, "amin")
        new = new[new]
        if new.equal(label):
            return label
        label = new


@dataclass(frozen=True, eq=False)
class _Units:
    """Where the channels of each unit lie, units in the order of their first place.

    ids: labels of the units; which: of each, the number of its profile; profiles: ((place, number of a unit's channels there), ...)
    in the order of the places, each different from the others;
    positions: those of all channels in their places, sorted by unit and place; starts (units,): the first one of each unit
    """

    ids: list[int]
    which: list[int]
    profiles: list[Profile]
    starts: Tensor
    positions: Tensor

    @classmethod
    def of(cls, places: list[Place], label: Tensor) -> "_Units":
        lengths = torch.tensor([len(place.ids) for place in places])
        if not lengths.sum():
            return cls([], [], [], lengths.new_empty(0), lengths.new_empty(0))
        labels = label[torch.cat([place.ids for place in places])]
        at = torch.arange(len(places)).repeat_interleave(lengths)
        positions = torch.arange(len(labels)) - (lengths.cumsum(0) - lengths)[at]
        pairs, order = (labels * len(places) + at).sort(stable=True)
        pairs, counts = pairs.unique_consecutive(return_counts=True)
        units, parts = (pairs // len(places)).unique_consecutive(return_counts=True)
        first = parts.cumsum(0) - parts  # the first pair of each unit
        starts = (counts.cumsum(0) - counts)[first]
        rank = (pairs % len(places))[first].argsort(stable=True)
        held = torch.stack([pairs % len(places), counts], 1).numpy()
        raw, size = held.tobytes(), held[0].nbytes  # bytes compare faster than tuples, of which there would be one per channel
        bounds = zip(first[rank].tolist(), (first + parts)[rank].tolist(), strict=True)
        known: dict[bytes, int] = {}
        which = [known.setdefault(raw[a * size : b * size], len(known)) for a, b in bounds]
        profiles = [tuple(map(tuple, np.frombuffer(key, held.dtype).reshape(-1, 2).tolist())) for key in known]
        return cls(units[rank].tolist(), which, profiles, starts[rank], positions[order])


def _group(places: list[Place], profile: Profile, starts: Tensor, positions: Tensor, exact: bool) -> PruningGroup:
    """The group of units with a profile, whose channels begin at ``starts``, (units,), among the positions."""
    first, found = 0, list[tuple[Place, Tensor]]()
    for k, count in profile:
        found.append((places[k], positions[starts[:, None] + torch.arange(first, first + count)]))
        first += count
    found = sorted(found, key=lambda pair: pair[0].role != "producer")
    order = found[0][1][:, 0].argsort()
    slices, stored = [], []
    for place, unordered in found:
        index, width = unordered[order], len(place.ids)
        reads = torch.cat([index + g * width for g in range(place.groups)], 1) if place.groups > 1 else None
        if place.is_count:
            stored.append(StoredCount(place.module, place.tensor, index.shape[1]))
        else:
            slices.append(GroupSlice(place.module, place.tensor, place.dim, index, place.role, reads))
    return PruningGroup(found[0][0].module, "channel", len(order), tuple(slices), tuple(stored), exact)


def _named(groups: list[PruningGroup]) -> Iterable[PruningGroup]:
    """The groups with unique names: the path of the producer, with ``:1``, ``:2`` after it for its further groups."""
    seen: dict[str, int] = {}
    for group in groups:
        k = seen[group.name] = seen.get(group.name, -1) + 1
        name = f"{group.name}:{k}" if k else group.name
        yield replace(group, name=name)


def _report(places: list[Place], units: _Units, reasons: dict[int, str]) -> Iterable[Frozen]:
    """The frozen channels, by producer (or by consumer if no layer produces them) and reason."""
    counts: dict[tuple[str, str], int] = {}
    for unit, profile in zip(units.ids, units.which, strict=True):
        if unit not in reasons:
            continue
        for role in ("producer", "consumer"):
            module = next((places[k].module for k, _ in units.profiles[profile] if places[k].role == role), None)
            if module is not None:
                key = (module if role == "producer" else f"the input of {module}", reasons[unit])
                counts[key] = counts.get(key, 0) + 1
                break
    for (what, reason), n in counts.items():
        yield Frozen(what, f"{n} unit{'s' if n > 1 else ''}: {reason}")
