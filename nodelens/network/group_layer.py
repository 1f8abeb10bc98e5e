"""A pruning group as a layer: its activations are captured where they are read, its weights are those of its members."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nodelens.statistics.rows import Rows

from .experts import ExpertLayer, Experts, Routed
from .groups import GroupSlice, PruningGroup, identity, submodule_of
from .layers import Layer
from .sharded import class_name

_IMAGES = (nn.Conv2d, nn.ConvTranspose2d)
_NORMS = nn.modules.batchnorm._BatchNorm


class Member(NamedTuple):
    """A weight that makes or reads the units of a group, and the layer where they are captured."""

    piece: GroupSlice
    layer: Layer

    @property
    def places(self) -> Tensor:
        """The index of each unit in the layer's rows, (units, places) int64."""
        return self.piece.places if self.piece.role == "consumer" else self.piece.index


class UnitValues(NamedTuple):
    """The captured values of a group's units at one of its members."""

    member: Member | None  # None for values of whole experts, (tokens, units)
    values: Tensor | Routed


class Kernels(NamedTuple):
    """The weights of one consumer, by unit.

    Shapes: weight (places, outputs, kernel) float64 on the CPU, outputs those of the place's group; places (units, places each)
    """

    weight: Tensor
    places: Tensor


@dataclass(frozen=True, eq=False)
class GroupLayer(Layer):
    """A pruning group as a layer. ``module`` is the whole model; ``name`` differs from the names of the member layers."""

    group: PruningGroup = field(kw_only=True)

    @classmethod
    def of(cls, model: nn.Module, group: PruningGroup) -> "GroupLayer":
        return cls(f"group {group.name}", model, group=group)

    @property
    def title(self) -> str:
        return self.group.name

    @classmethod
    def around(cls, model: nn.Module, layer: Layer, path: str) -> "GroupLayer":
        """A layer, whose module is at a path, as a group of its own units: made by its weight or, for an input, read by it."""
        module = layer.module
        transposed = hasattr(module, "nf") or bool(getattr(module, "transposed", False))  # weight stored as (inputs, outputs)
        pieces: tuple[GroupSlice, ...] = ()
        if layer.side == "output" and layer.shape is not None:
            pieces = (GroupSlice(path, "weight", int(transposed), identity(layer.shape[0]), "producer"),)
        elif layer.side == "input" and Layer(path, module).shape is not None:
            weight: Any = module.weight
            width = int(getattr(module, "in_channels", None) or weight.shape[0 if transposed else 1])
            pieces = (GroupSlice(path, "weight", 0 if transposed else 1, identity(width), "consumer"),)
        n = len(pieces[0].index) if pieces else 0
        return cls.of(model, PruningGroup(layer.name, "channel", n, pieces))

    @cached_property
    def readers(self) -> list[Member]:
        """The weights that read the units, each with the layer that captures its input."""
        return [Member(piece, self._layer(piece, "input")) for piece in self.pieces("consumer")]

    @cached_property
    def makers(self) -> list[Member]:
        """The weights that make the units, each with the layer that captures its output."""
        return [Member(piece, self._layer(piece, "output")) for piece in self.pieces("producer")]

    def pieces(self, *roles: str) -> list[GroupSlice]:
        """The group's slices of weights with these roles, without biases."""
        return [piece for piece in self._weights if piece.role in roles]

    @cached_property
    def _weights(self) -> list[GroupSlice]:
        return [piece for piece in self.group.slices if piece.ndim(self.module) > 1]

    @property
    def weight(self) -> Tensor | None:
        """The weights that make each unit, of all producers, (units, numbers) float64 on the first one's device."""
        rows = [piece.by_unit(self.module) for piece in self.pieces("producer")]
        if len(rows) < 2:
            return rows[0].double() if rows else None
        widths = [part.shape[1] for part in rows]
        found = rows[0].new_empty((len(rows[0]), sum(widths)), dtype=torch.float64)
        for to, part in zip(found.split(widths, 1), rows, strict=True):
            to.copy_(part)  # without a copy of each part in float64
        return found

    def has(self, parameter: str) -> bool:
        """Whether a property such as ``weight`` or ``norm`` is not None."""
        return bool(self.pieces("producer")) if parameter == "weight" else getattr(self, parameter) is not None

    @property
    def norm(self) -> Tensor | None:
        """The scales of the batch norms tied to the group, (units, norms); None if there are none."""
        tied = (piece for piece in self.group.by_role("tied") if piece.tensor == "weight")
        scales = [p.by_unit(self.module) for p in tied if isinstance(self.module.get_submodule(p.module), _NORMS)]
        return torch.cat(scales, 1) if scales else None

    @property
    def kernels(self) -> list[Kernels]:
        """The weights that read the units, one entry per consumer."""
        return [Kernels(_kernels(self.module, piece).cpu(), piece.places) for piece, _ in self.readers]

    @property
    def columns(self) -> Tensor:
        """Absolute consumer weights per unit, (outputs, units) float64: kernels are summed, then sizes over a unit's places."""
        return torch.cat([k.weight.sum(2)[k.places].abs().sum(1).T for k in self.kernels])

    @property
    def image_reader(self) -> Member | None:
        """The first reader that is a two-dimensional convolution."""
        return next((m for m in self.readers if isinstance(self.module.get_submodule(m.piece.module), _IMAGES)), None)

    def rows(self, tensor: UnitValues, samples: int, mask: Tensor | None = None) -> Rows:
        """Rows (samples, units, positions) of captured values, summed over a unit's places. Unrouted tokens are 0."""
        member, values = tensor
        if member is not None and isinstance(values, Tensor):
            rows = member.layer.rows(values, samples, mask)
            return Rows(added(rows.raw, member.places), rows.keep, grid=rows.grid)
        flat = _dense(values) if isinstance(values, Routed) else values
        if len(flat) % samples:
            raise ValueError(f"{self.title} has {len(flat)} tokens for {samples} samples; every sample needs as many tokens")
        raw = flat.unflatten(0, (samples, -1)).transpose(1, 2)
        raw = raw if member is None else added(raw, member.places)
        keep = mask if mask is not None and mask.shape == (samples, raw.shape[2]) else None
        return Rows(raw, keep, grid=(raw.shape[2],))

    def maps(self, tensor: Tensor, samples: int) -> Rows:
        """Images of the units as rows (samples, units, places x pixels), grid (places, height, width)."""
        member = self.image_reader
        assert member is not None
        rows = member.layer.rows(tensor, samples)
        if len(rows.grid) != 2 or min(rows.grid) < 2:
            shape = " x ".join(map(str, rows.grid)) or "single numbers"
            raise ValueError(
                f"group {self.title!r} has maps of {shape}: a rank needs images of 2 x 2 pixels at least; leave it out"
            )
        raw = rows.raw[:, member.places.to(rows.raw.device)].flatten(2)
        return Rows(raw, grid=(member.places.shape[1], *rows.grid))

    def _layer(self, piece: GroupSlice, side: str) -> Layer:
        module = submodule_of(self.module, piece.module)
        if piece.entry is not None:
            experts, name = Experts.of(module), f"{piece.module}[{piece.entry}]"
            if experts is None:
                return Layer(name, module)  # no hook captures the units
            return ExpertLayer(f"{name}.hidden", module, "hidden", experts=experts, expert=piece.entry)
        name = piece.module or class_name(self.module)
        return Layer(f"{name}.input" if side == "input" else name, module, side)


def added(raw: Tensor, places: Tensor) -> Tensor:
    """Sums values over each unit's places: (samples, width, positions) -> (samples, units, positions)."""
    units, count = places.shape
    if count == 1 and units == raw.shape[1] and torch.equal(places[:, 0], torch.arange(units)):
        return raw
    return raw[:, places.to(raw.device)].sum(2) if count > 1 else raw[:, places[:, 0].to(raw.device)]


def _kernels(model: nn.Module, piece: GroupSlice) -> Tensor:
    """A consumer's weights by place of its input, (places, outputs, kernel) float64."""
    module, weight = model.get_submodule(piece.module), piece.of(model).double()
    if isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
        by_group = weight.unflatten(0, (module.groups, -1)).transpose(1, 2)  # (groups, inputs per group, outputs per group, ...)
        return by_group.flatten(0, 1).flatten(2)
    place_first = weight.movedim(piece.dim - (piece.entry is not None), 0)
    return place_first.reshape(*place_first.shape[:2], -1)


def _dense(values: Routed) -> Tensor:
    """Values of an expert's units at every token, (tokens, units); 0 where the token is not routed to the expert."""
    dtype = torch.promote_types(values.values.dtype, torch.float32)
    flat = values.values.new_zeros(values.every, values.values.shape[1], dtype=dtype)
    flat[values.tokens] = values.values.to(dtype)
    return flat
