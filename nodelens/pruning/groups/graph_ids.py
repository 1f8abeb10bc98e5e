"""Numbers for channels: which go together, which have to stay, and the groups that are left."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nodelens.network.groups import Frozen, GroupSlice, Patch, PruningGroup, PruningGroups, Role

Profile = list[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Place:
    """The channels along one dimension of one tensor, ids (length,).

    groups: how often the ids stand one after the other in what a grouped convolution reads.
    number: not a tensor but a number of the module, which falls by one with each channel.
    """

    module: str
    tensor: str
    dim: int
    ids: Tensor
    role: Role
    groups: int = 1
    number: bool = False


@dataclass
class Ids:
    """Channels as they are found: an id each, ties between them, where they lie, what freezes them."""

    count: int = 0
    places: dict[tuple[str, str, int], Place] = field(default_factory=dict)
    ties: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    stops: list[tuple[Tensor, str]] = field(default_factory=list)
    normalized: list[Tensor] = field(default_factory=list)

    def fresh(self, length: int) -> Tensor:
        """Ids that nobody has, (length,)."""
        self.count += length
        return torch.arange(self.count - length, self.count)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """These go together, one by one."""
        if a is not b:
            self.ties.append((a, b))

    def stop(self, ids: Tensor, reason: str) -> None:
        """These have to stay. Of several reasons the first is reported."""
        self.stops.append((ids, reason))

    def put(self, place: Place) -> None:
        """Notes where channels lie; a tensor that is used twice ties both uses."""
        first = self.places.setdefault((place.module, place.tensor, place.dim), place)
        if (first.role, first.groups, len(first.ids)) == (place.role, place.groups, len(place.ids)):
            self.tie(first.ids, place.ids)
        else:
            for ids in (first.ids, place.ids):
                self.stop(ids, f"{place.tensor} of {place.module} is used in two ways")

    def groups(self) -> PruningGroups:
        """Units are what is tied together; those with as many places in the same tensors are a group."""
        label, places = joined(self.count, self.ties), list(self.places.values())
        profiles, reasons = _profiles(places, label), self._reasons(label)
        alike: dict[tuple, list[int]] = {}
        for unit, profile in profiles.items():
            roles = {places[k].role for k, _ in profile}
            if unit not in reasons and "producer" in roles:
                if "consumer" in roles:
                    alike.setdefault(tuple(profile), []).append(unit)
                else:
                    reasons[unit] = "nothing reads them"
        inexact = set(torch.cat([label[ids] for ids in self.normalized]).tolist()) if self.normalized else set()
        found = [
            _axis([places[k] for k, _ in profile], units, label, inexact.isdisjoint(units)) for profile, units in alike.items()
        ]
        order = {name: k for k, name in enumerate(dict.fromkeys(p.module for p in places if p.role == "producer"))}
        found.sort(key=lambda group: (order[group.name], int(group.slices[0].index.min())))
        return PruningGroups(tuple(_named(found)), tuple(_report(places, profiles, reasons)))

    def _reasons(self, label: Tensor) -> dict[int, str]:
        reasons: dict[int, str] = {}
        for ids, reason in self.stops:
            for unit in label[ids].unique().tolist():
                reasons.setdefault(unit, reason)
        return reasons


def joined(count: int, ties: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The lowest id that each is tied to, by whatever detour, (count,): union-find in a few passes over all ties at once."""
    pairs = list(ties)
    label = torch.arange(count)
    if not pairs:
        return label
    a, b = (torch.cat(side) for side in zip(*pairs, strict=True))
    while True:
        low = torch.minimum(label[a], label[b])
        new = label
        for end in (a, b, label[a], label[b]):  # the ends of a tie, and the roots that they have so far
            new = new.scatter_reduce(0, end, low, "amin")
        new = new[new]
        if new.equal(label):
            return label
        label = new


def _profiles(places: list[Place], label: Tensor) -> dict[int, Profile]:
    """{unit: [(place, how many channels of the unit lie there), ...]}, in the places' order."""
    profiles: dict[int, Profile] = {}
    for k, place in enumerate(places):
        found, counts = label[place.ids].unique(return_counts=True)
        for unit, count in zip(found.tolist(), counts.tolist(), strict=True):
            profiles.setdefault(unit, []).append((k, count))
    return profiles


def _axis(places: list[Place], units: list[int], label: Tensor, exact: bool) -> PruningGroup:
    makers = [place for place in places if place.role == "producer"]
    wanted = torch.tensor(sorted(units))
    made = label[makers[0].ids]
    order = torch.tensor(list(dict.fromkeys(made[torch.isin(made, wanted)].tolist())))
    slices, patches = [], []
    for place in [*makers, *(p for p in places if p.role != "producer")]:
        there = label[place.ids]
        index = _index(there, order)
        reads = _index(there.repeat(place.groups), order) if place.groups > 1 else None
        if place.number:
            patches.append(Patch(place.module, place.tensor, index.shape[1]))
        else:
            slices.append(GroupSlice(place.module, place.tensor, place.dim, index, place.role, reads))
    return PruningGroup(makers[0].module, "channel", len(order), tuple(slices), tuple(patches), exact)


def _index(there: Tensor, units: Tensor) -> Tensor:
    """Where each unit lies among labels, (units, span)."""
    places = torch.isin(there, units).nonzero()[:, 0]
    rank = torch.argsort(units)
    unit = rank[torch.searchsorted(units[rank], there[places])]
    return places[torch.argsort(unit, stable=True)].reshape(len(units), -1)


def _named(groups: list[PruningGroup]) -> Iterable[PruningGroup]:
    """PruningGroups with names of their own: the first of a producer has the producer's."""
    seen: dict[str, int] = {}
    for group in groups:
        k = seen[group.name] = seen.get(group.name, -1) + 1
        name = f"{group.name}:{k}" if k else group.name
        yield replace(group, name=name)


def _report(places: list[Place], profiles: dict[int, Profile], reasons: dict[int, str]) -> Iterable[Frozen]:
    """What stays, by who makes it (or, of what no layer makes, who reads it) and why."""
    counts: dict[tuple[str, str], int] = {}
    for unit, profile in profiles.items():
        if unit not in reasons:
            continue
        for role in ("producer", "consumer"):
            found = next((places[k].module for k, _ in profile if places[k].role == role), None)
            if found is not None:
                key = (found if role == "producer" else f"the input of {found}", reasons[unit])
                counts[key] = counts.get(key, 0) + 1
                break
    for (what, reason), n in counts.items():
        yield Frozen(what, f"{n} unit{'s' if n > 1 else ''}: {reason}")
