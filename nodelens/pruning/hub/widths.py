"""The config of a pruned model of transformers: the dense one with the widths that are left, where its class can say them."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from nodelens.network.groups import PruningGroup
from nodelens.pruning.groups.projections import attribute

_UNSET = ("n_inner", "ffn_dim", "intermediate_size")  # fields that may be None, for a multiple of the model's width
Edit = dict[tuple[str, ...], int]  # {path of a field: its value}


@dataclass(frozen=True)
class Widths:
    """A pruned model, and the groups that lost units, with the numbers of those that are left.

    Whether a config describes the model is never taken from its names alone: the class builds a model of shapes from it, which
    has to agree with the pruned one in all names and shapes, in the counts that slicing changed, and in every other number with a
    fraction that a module stores, such as a scale of attention.
    """

    model: nn.Module
    numbers: Mapping[str, Mapping[str, int]]
    left: tuple[tuple[PruningGroup, int], ...]

    def config(self) -> Any | None:
        """The config that describes the pruned model, or None. A field is changed where more tensors then have their shapes."""
        config: Any = self.model.config
        best, most = copy.deepcopy(config), self._alike(config)
        tried: set[str] = set()
        grows = most < len(self._shapes)
        while grows:
            grows = False
            for edit in self._edits(best.to_dict()):
                if (key := f"{most} {edit}") in tried:
                    continue
                tried.add(key)
                changed = _edited(best, edit)
                if changed is not None and (alike := self._alike(changed)) > most:
                    best, most, grows = changed, alike, True
        return best if most == len(self._shapes) and self._agrees(best) else None

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        return _shapes(self.model)

    def _alike(self, config: Any) -> int:
        """How many tensors of a model with that config have the shapes of the pruned one; -1 if none can be built."""
        built = self._built(config)
        if built is None:
            return -1
        shapes = _shapes(built)
        return sum(shapes.get(name) == shape for name, shape in self._shapes.items()) - len(shapes.keys() - self._shapes.keys())

    def _built(self, config: Any) -> nn.Module | None:
        kind: Any = type(self.model)
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                return kind(copy.deepcopy(config))
        except Exception:  # whatever a constructor raises for values that do not fit
            return None

    def _agrees(self, config: Any) -> bool:
        """Whether a model with that config has the counts of the pruned one, and every number with a fraction."""
        built = self._built(config)
        assert built is not None
        counts = ((path, name, value) for path, numbers in self.numbers.items() for name, value in numbers.items())
        return all(attribute(built.get_submodule(path), name) == value for path, name, value in counts) and all(
            vars(module).get(name) == value
            for path, part in self.model.named_modules()
            for module in [built.get_submodule(path)]
            for name, value in vars(part).items()
            if type(value) is float
        )

    def _edits(self, content: Mapping[str, Any]) -> Iterator[Edit]:
        """Fields that hold the number of a group's units, or a multiple of it where they count heads, with what is left of it."""
        fields = list(_fields(content))
        for n, left, span in dict.fromkeys((group.n, left, _span(group)) for group, left in self.left):
            for path, value in fields:
                heads = "head" in path[-1]
                if type(value) is int and value > 0 and (value == n or (heads and value % n == 0)):
                    edit = {path: value // n * left}
                    yield edit
                    if heads and span % (value // n) == 0:  # else the dimension of a head would follow from the number of heads
                        yield edit | {(*path[:-1], "head_dim"): span // (value // n)}
                elif value is None and path[-1] in _UNSET:
                    yield {path: left}


def _span(group: PruningGroup) -> int:
    """How many places of its first consumer a unit takes: of a head, its dimension."""
    return next((piece.index.shape[1] for piece in group.by_role("consumer")), 1)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Shapes of parameters and buffers, also of buffers that are not stored."""
    return {name: t.shape for name, t in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}


def _fields(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Fields of a config, those of configs inside it too."""
    items: Iterable[tuple[Any, Any]] = content.items() if isinstance(content, Mapping) else ()
    for name, value in items:
        if isinstance(value, Mapping):
            yield from _fields(value, (*path, str(name)))
        else:
            yield (*path, str(name)), value


def _edited(config: Any, edit: Edit) -> Any | None:
    """A config with other values; None if its class refuses them."""
    content = config.to_dict()
    for path, value in edit.items():
        holder = content
        for name in path[:-1]:
            holder = holder[name]
        holder[path[-1]] = value
    try:
        changed = type(config).from_dict(content)
    except Exception:  # configs check themselves in many ways
        return None
    for name in ("_attn_implementation", "_experts_implementation"):
        setattr(changed, name, getattr(config, name, None))
    return changed
