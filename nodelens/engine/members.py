"""Where the units of pruning groups are captured: at the layers that read or make them, or at the group itself."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from nodelens.metrics import Metric
from nodelens.network.find_layers import with_start
from nodelens.network.group_layer import GroupLayer
from nodelens.network.group_layer import Member as GroupMember
from nodelens.network.layers import Layer

Side = Literal["group", "reader", "maker"]
IndexedLayers = list[tuple[Layer, Tensor]]  # a layer, and the index of each unit in its rows, (units, places)
_GROUP_PORTS = {"made*grad", "consumed", "maps", "load", "model"}  # ports that only a group has
_AT_GROUP = _GROUP_PORTS | {"output*grad", "output*grad/tokens"}
_AT_READERS = {"output", "activated", "output*grad", "grad", "output*grad/tokens", "grad/tokens"}  # ports of a reader's input


def side_of(metric: Metric) -> Side:
    """The side of a pruning group where a metric is evaluated.

    ``group``: rows or weights of the group itself. ``reader``: the inputs of the layers that read the units, for metrics of
    activations alone. ``maker``: the layers that make the units.
    """
    needs = metric.needs().values()
    if {need.port for need in needs} <= _AT_GROUP and metric.parameter not in ("tensor", "change"):
        return "group"
    values_only = not metric.weighted and all(need.port in _AT_READERS and need.target != "input" for need in needs)
    return "reader" if values_only else "maker"


def of_groups_only(metric: Metric) -> bool:
    """Whether a metric reads what only a group has; a layer is then measured as a group of its own units."""
    return metric.parameter == "group" or any(need.port in _GROUP_PORTS for need in metric.needs().values())


class UnreadableGroupsError(ValueError):
    """Pruning groups whose units no layer shows; ``reasons``: {group: why}."""

    def __init__(self, text: str, reasons: Mapping[str, str]):
        super().__init__(text)
        self.reasons = reasons


@dataclass(frozen=True)
class Members:
    """Pruning groups and the layers where their units are captured, each listed once even if several groups use it."""

    groups: list[GroupLayer] = field(default_factory=list)
    around: Mapping[str, GroupLayer] = field(default_factory=dict)  # layers that are measured as groups of their own units
    readers: Mapping[str, IndexedLayers] = field(default_factory=dict)  # by group
    makers: Mapping[str, IndexedLayers] = field(default_factory=dict)
    mixtures: Mapping[str, Layer] = field(default_factory=dict)  # for whole experts: the mixture's module
    model: Layer | None = None  # holds the sums over all groups

    @classmethod
    def find(
        cls, model: nn.Module, layers: Sequence[Layer], metrics: Mapping[str, Metric], start: Mapping[str, Tensor] | None = None
    ) -> "Members":
        """The members of the groups in ``layers`` that the metrics read. ``start``: the weights before training.

        Raises ValueError if a metric reads activations and no layer captures the units of a group.
        """
        groups = [layer for layer in layers if isinstance(layer, GroupLayer)]
        around = {}
        if any(map(of_groups_only, metrics.values())):
            paths = {module: path for path, module in model.named_modules()}
            around = {la.name: GroupLayer.around(model, la, paths[la.module]) for la in layers if not isinstance(la, GroupLayer)}
        known = {layer.name: layer for layer in layers if not isinstance(layer, GroupLayer)}
        found = cls([*groups, *around.values()], around, {}, {}, {}, Layer("(model)", model) if groups or around else None)
        readers, makers, mixtures = dict[str, IndexedLayers](), dict[str, IndexedLayers](), dict[str, Layer]()
        for name, metric in metrics.items():
            for group in found.groups if of_groups_only(metric) else groups:
                if group.group.router is not None and metric.needs():
                    mixtures[group.name] = known.setdefault(group.makers[0].layer.name, group.makers[0].layer)
                for side in _sides_read(metric):
                    every = group.readers if side == "reader" else group.makers
                    if side_of(metric) == "maker":  # no module outputs the units of experts that share a tensor
                        every = [member for member in every if member.piece.tensor == "weight"]
                    (readers if side == "reader" else makers).setdefault(group.name, _indexed_layers(name, group, every, known))
        if start is not None:
            makers = {name: [(with_start(layer, start), places) for layer, places in every] for name, every in makers.items()}
        return cls(found.groups, around, readers, makers, mixtures, found.model)

    def observed(self, layers: Sequence[Layer]) -> list[Layer]:
        """The layers to hook: those in ``layers``, and those that capture units of groups."""
        every = dict.fromkeys([*layers, *self.layers])
        return [layer for layer in every if not isinstance(layer, GroupLayer) and layer is not self.model]

    @property
    def layers(self) -> list[Layer]:
        """The layers that capture units of groups, the groups around layers, and the model."""
        indexed = [layer for side in (self.readers, self.makers) for every in side.values() for layer, _ in every]
        every = dict.fromkeys([*indexed, *self.mixtures.values(), *self.around.values()])
        return [*every, *([] if self.model is None else [self.model])]

    def of(self, group: GroupLayer, side: Side) -> IndexedLayers:
        """The layers that capture a group's units on one side."""
        return (self.readers if side == "reader" else self.makers)[group.name]

    def unread(self, layers: Mapping[str, str]) -> dict[str, str]:
        """{group: reason} of groups that are captured at one of these layers, which are given with what is wrong with them."""
        every = [
            (group, layer.name)
            for group in self.groups
            for side in (self.readers, self.makers)
            for layer, _ in side.get(group.name, ())
        ]
        return {group.title: f"{name!r}, where they are captured, {layers[name]}" for group, name in every if name in layers}

    def without_samples(self, shapes: Mapping[str, str]) -> str:
        """The message for groups whose units are captured where the first axis is not the samples; empty if there are none."""
        sides = (*self.readers.items(), *self.makers.items())
        places = {name: layer.name for name, every in sides for layer, _ in every if layer.name in shapes}
        groups = {group.name: group.title for group in self.groups if group.name in places}
        if not groups:
            return ""
        name, title = next(iter(groups.items()))
        titles = list(groups.values())
        out = ", ".join(map(repr, titles[:8])) + (f", and {len(titles) - 8} more" if len(titles) > 8 else "")
        way_out = f"score by weights (magnitude), or leave out what is read so: freeze=[{out}] in a pruning"
        return f"group {title!r} is read by {places[name]!r}, which {shapes[places[name]]}; {way_out}"

    @property
    def chain(self) -> list[Layer]:
        """The layers that make the units, in order."""
        return list(dict.fromkeys(layer for every in self.makers.values() for layer, _ in every))


def _sides_read(metric: Metric) -> Iterator[Side]:
    """The sides of a group that a metric reads."""
    needs = metric.needs().values()
    ports_watched = {need.statistic.watches(*need.options) for need in needs if need.port == "model"}  # type: ignore[attr-defined]
    side, ports = side_of(metric), {port.partition("/")[0] for port in ports_watched | {need.port for need in needs}}
    if side == "reader" or (side == "group" and ports & {"output*grad", "consumed", "maps"}):
        yield "reader"
    elif side == "maker" or "made*grad" in ports:
        yield "maker"


def _indexed_layers(metric: str, group: GroupLayer, members: Sequence[GroupMember], known: dict[str, Layer]) -> IndexedLayers:
    if group.group.router is not None:
        return []
    if not members or any(reader.piece.tensor != "down_proj" for reader in group.readers if reader.piece.entry is not None):
        raise ValueError(
            f"{metric} reads activations, but no hook captures the units of group {group.title!r}: its experts share one tensor; "
            "score it by weights (magnitude, group_l2) or by their gradients (llm_pruner), or leave it out with freeze="
        )
    return [(known.setdefault(member.layer.name, member.layer), member.places) for member in members]
