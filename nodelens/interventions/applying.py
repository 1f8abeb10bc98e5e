"""Applies edits to a running model: each edit becomes a function of what its modules read or put out."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.network import hooks
from nodelens.network.experts import ExpertLayer
from nodelens.network.find_layers import find_layers
from nodelens.network.groups import GroupSlice, PruningGroup
from nodelens.network.layers import Layer
from nodelens.network.open_attention import opened

from .donors import donated
from .edit_value import Edit
from .expert_gates import multiplied
from .operations import changed, through
from .selection import Selected, Selection
from .token_positions import indices
from .tokens_seen import TokensSeen

_UNITS, _SAMPLES = (1, -1), (0, 1)  # axes, from and to: of units behind the channels, of samples behind the tokens


@dataclass(eq=False)
class EditTarget:
    """One module that an edit changes, and whether it has run (``fired``) and been changed (``hit``).

    places (units, span): where the units of a pruning group lie in what the module reads; None for a layer.
    """

    edit: Edit
    layer: Layer
    port: str
    selection: Selection
    seen: TokensSeen
    places: Tensor | None = None
    fired: bool = False
    hit: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """The tensor with the selected units changed. Raises ValueError, naming the edit, where something does not fit."""
        self.fired = True
        move = _UNITS if self.layer.channels_second(x) else _SAMPLES if self.seen.turned(x) else None
        moved = x if move is None else x.movedim(*move)
        try:
            if not x.is_floating_point():
                raise ValueError(f"it shows {str(x.dtype).removeprefix('torch.')}: edits change floating-point values")
            new = self._new(moved, move)
        except ValueError as error:
            raise ValueError(f"{self.edit} at {self.layer.name}: {error}") from None
        return x if new is moved else new if move is None else new.movedim(*reversed(move))

    def _new(self, x: Tensor, move: tuple[int, int] | None) -> Tensor:
        """Of a tensor with samples first and units last. move: the axis that was moved, from and to."""
        units, whole, second = self._units(x.shape[-1]), self._whole(x, move), move == _UNITS
        if self.selection.everything:
            self.hit = True
            if self.edit.operation == "zero" and units is not None:
                return x.index_fill(-1, units.to(x.device), 0)
            old, value = _picked(x, units), self._value(x.shape[-1], second and _ndim(self.edit.value) == x.ndim)
            return _filled(x, units, changed(self.edit.operation, old, value) if whole is None else _picked(whole, units))
        samples = self.seen.samples or len(x)
        if len(x) % samples:
            raise ValueError(
                f"it shows {tuple(x.shape)} for a batch of {samples} samples: the first axis has to be that of the samples"
            )
        flat = x.reshape(samples, -1, x.shape[-1])
        selected = self.selection.rows(self._tokens(samples, flat.shape[1]))
        if selected is None:
            return x
        self.hit = True
        b, p = selected.b.to(x.device), selected.p.to(x.device)
        old = flat[b, p]
        if whole is None:
            new = changed(self.edit.operation, _picked(old, units), self._value_of(selected, x.shape[-1]))
        else:
            new = _picked(whole.reshape(flat.shape)[b, p], units)
        return flat.index_put((b, p), _filled(old, units, new)).reshape(x.shape)

    def _tokens(self, samples: int, positions: int) -> TokensSeen:
        """What passes in this call; for edits that depend on samples only, whatever the site shows."""
        if self.edit.positions is None and self.edit.phase == "all":
            return self.seen.rows_of(samples, positions)
        return self.seen.at(samples, positions)

    def _whole(self, x: Tensor, move: tuple[int, int] | None) -> Tensor | None:
        """The whole tensor after an operation that does not act on single rows; None for the others."""
        if self.edit.operation == "module":
            if move is None:
                return through(x, self.edit.value)
            return through(x.movedim(*reversed(move)), self.edit.value).movedim(*move)
        if self.edit.operation == "resample":
            samples = self.seen.samples or len(x)
            flat = x.reshape(samples, -1, x.shape[-1])
            return donated(flat, self.seen.rows_of(*flat.shape[:2]), self.edit.value, self.edit.seed).reshape(x.shape)
        return None

    def _chosen(self, width: int) -> list[int] | None:
        """The edited units, of a group its own; None for all of them."""
        n = width if self.places is None else len(self.places)
        return None if self.edit.units is None else indices(self.edit.units, n, "units")

    def _units(self, width: int) -> Tensor | None:
        """Where the edited units lie among ``width`` entries; None for all of these."""
        chosen = self._chosen(width)
        if self.places is None:
            return None if chosen is None else torch.tensor(chosen)
        entries = (self.places if chosen is None else self.places[chosen]).flatten()
        return None if entries.equal(torch.arange(width)) else entries

    def _value(self, width: int, channels_second: bool = False) -> Any:
        """The value of the edited units: of one for all units those that are edited, of a group one per entry of a unit."""
        value, chosen = self.edit.value, self._chosen(width)
        if not isinstance(value, Tensor) or not value.ndim or self.edit.operation in ("project_out", "resample"):
            return value
        value = value.movedim(1, -1) if channels_second else value
        n = width if self.places is None else len(self.places)
        if chosen is not None and value.shape[-1] == n != len(chosen):
            value = value[..., chosen]
        per_unit = self.places is not None and value.shape[-1] == (n if chosen is None else len(chosen))
        return value.repeat_interleave(self.places.shape[1], -1) if per_unit and self.places is not None else value

    def _value_of(self, selected: Selected, width: int) -> Any:
        """The value for each selected row. Raises ValueError where it has another number of samples or positions."""
        value = self._value(width)
        if not isinstance(value, Tensor) or value.ndim < 2 or self.edit.operation == "project_out":
            return value
        given = value[None] if value.ndim == 2 else value
        if given.ndim > 3 or any(have not in (1, want) for have, want in zip(given.shape, selected.size, strict=False)):
            raise ValueError(
                f"value is {tuple(value.shape)}, selected are {selected.size[0]} samples of {selected.size[1]} positions: give "
                "(positions, units) or (samples, positions, units)"
            )
        s, p = (place if size > 1 else place * 0 for place, size in zip(selected[2:4], given.shape, strict=False))
        return given[s.to(given.device), p.to(given.device)]


@contextmanager
def applied(
    model: nn.Module, edits: Sequence[Edit], groups: Sequence[PruningGroup] = (), tokenizer: Any = None, texts: Any = None
) -> Iterator[Callable[[], None]]:
    """Inside the context, the edits are applied; yields a check that each of them has changed something."""
    seen = TokensSeen()
    by_name = {group.name: group for group in groups}
    targets, gates = list[EditTarget](), list[tuple[GroupSlice, Tensor]]()
    selections = [Selection(each.samples, each.positions, each.phase, tokenizer, texts) for each in edits]
    for each, own in zip(edits, selections, strict=True):
        if each.site in by_name:
            targets += _of_group(model, each, by_name[each.site], own, seen)
            gates += _of_experts(each, by_name[each.site])
        else:
            targets += [_of_layer(each, layer, own, seen) for layer in _layers(model, each, by_name)]
    _check_decoder(model, targets)
    chains: dict[str, dict[nn.Module, list[EditTarget]]] = {"output": {}, "input": {}}
    for target in targets:
        chains[target.port].setdefault(target.layer.module, []).append(target)
    outputs, inputs = ({m: partial(_through, own) for m, own in chains[port].items()} for port in ("output", "input"))
    by_row = any(not own.everything or each.operation == "resample" for own, each in zip(selections, edits, strict=True))
    with opened(model), seen.following(model, by_row), multiplied(model, gates), hooks.edit(outputs, inputs):
        yield partial(_check, model, edits, targets, seen)


def _through(targets: Sequence[EditTarget], x: Tensor) -> Tensor:
    for target in targets:
        x = target(x)
    return x


def _layers(model: nn.Module, edit: Edit, groups: Any) -> list[Layer]:
    try:
        layers = find_layers(model, edit.site)
    except ValueError as error:
        known = list(groups)[:6]
        more = (
            f"; its groups are {', '.join(known)}"
            if known
            else "; to name a pruning group, give groups=nl.find_groups(model, batch)"
        )
        raise ValueError(f"{edit}: {error}{more}") from None
    mixed = next((layer for layer in layers if isinstance(layer, ExpertLayer)), None)
    if mixed is not None:
        raise ValueError(
            f"{edit}: {mixed.name} are units of an expert in shared tensors, which no module shows: name its pruning group, with "
            "groups=nl.find_groups(model)"
        )
    return layers


def _of_layer(edit: Edit, layer: Layer, selection: Selection, seen: TokensSeen) -> EditTarget:
    port = "input" if layer.side == "input" else edit.port
    return EditTarget(edit, Layer(layer.name, layer.module), port, selection, seen)


def _check_decoder(model: nn.Module, targets: Sequence[EditTarget]) -> None:
    """Raises ValueError for positions in the encoder of an encoder-decoder, whose tokens are not followed."""
    encoder = getattr(model, "get_encoder", None)
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not callable(encoder):
        return
    inside = set(encoder().modules())
    for target in targets:
        if target.layer.module in inside and (target.edit.positions is not None or target.edit.phase != "all"):
            raise ValueError(
                f"{target.edit} at {target.layer.name}: an encoder's tokens are not counted: leave out positions and phase, or "
                "name a site in the decoder"
            )


def _of_group(model: nn.Module, edit: Edit, group: PruningGroup, selection: Selection, seen: TokensSeen) -> list[EditTarget]:
    """A group is edited where its units are read."""
    if group.router is not None:
        raise ValueError(f"{edit}: its units are whole experts, which are edited by their router: name the channels of the experts")
    pieces = [piece for piece in group.by_role("consumer") if piece.entry is None]
    layers = [Layer(piece.module, model.get_submodule(piece.module)) for piece in pieces]
    return [EditTarget(edit, la, "input", selection, seen, piece.places) for la, piece in zip(layers, pieces, strict=True)]


def _of_experts(edit: Edit, group: PruningGroup) -> list[tuple[GroupSlice, Tensor]]:
    """Gates of a group in tensors of experts. Raises ValueError for all but zero and scale, and for parts of a batch."""
    pieces = [piece for piece in group.by_role("consumer") if piece.entry is not None]
    if not pieces:
        return []
    if edit.operation not in ("zero", "scale") or edit.positions is not None or edit.samples is not None or edit.phase != "all":
        raise ValueError(
            f"{edit}: its experts share their tensors: their units can only be zeroed or scaled, for all samples and positions"
        )
    units = list(range(group.n)) if edit.units is None else indices(edit.units, group.n, "units")
    value = torch.zeros(()) if edit.operation == "zero" else edit.value
    gate = torch.ones(group.n, dtype=value.dtype).index_copy(0, torch.tensor(units), value.detach().cpu().expand(len(units)))
    return [(piece, gate) for piece in pieces]


def _check(model: nn.Module, edits: Sequence[Edit], targets: Sequence[EditTarget], seen: TokensSeen) -> None:
    """Raises ValueError for an edit whose site has not run, or that has changed no row, although the model was called."""
    if not seen.calls:
        return
    for each in edits:
        own = [target for target in targets if target.edit is each]
        idle = [target.layer.name for target in own if not target.fired]
        if own and len(idle) == len(own):
            raise ValueError(
                f"{each}: {idle[0]} was never called by {type(model).__name__}.forward (its parent may read its weight directly): "
                "name another site, such as the module that takes its output"
            )
        if idle and own[0].places is None:
            warnings.warn(f"{each}: {len(idle)} of its {len(own)} modules were never called, such as {idle[0]}", stacklevel=4)
        if own and not any(target.hit for target in own):
            raise ValueError(
                f"{each}: no such row has passed in {seen.calls} calls of {type(model).__name__}: phase is {each.phase!r}, and "
                "generated tokens pass only in model.generate or with a cache"
            )


def _picked(x: Tensor, units: Tensor | None) -> Tensor:
    return x if units is None else x.index_select(-1, units.to(x.device))


def _filled(x: Tensor, units: Tensor | None, new: Tensor) -> Tensor:
    return new if units is None else x.index_copy(-1, units.to(x.device), new.to(x.dtype))


def _ndim(value: Any) -> int:
    return value.ndim if isinstance(value, Tensor) else -1
