"""What every statistic is: sums over rows, as a value; and the one place that adds them up."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from inspect import signature
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .rows import Rows


@dataclass(frozen=True, eq=False)
class Statistic:
    """Sums over rows and nothing else: parts add to the whole, whatever the split.

    A subclass is a frozen dataclass of tensors, each with a dimension, float64 or int64. It makes one of rows in ``of``
    and, where its sums are about a shift, says in ``about`` what they are about another.
    """

    shifts: ClassVar[tuple[str, ...]] = ()
    by_sample: ClassVar[str | None] = None  # the sums over a sample's positions it is made of, beside their plain sum
    entries: ClassVar[bool] = False  # whether its rows are what the units of a layer read, patches of a convolution
    keyed: ClassVar[bool] = False  # whether it takes the samples' keys
    merged: ClassVar[bool] = False  # whether parts are put together otherwise than field by field

    def about(self, **shifts: Tensor) -> Self:
        """The same sums about other shifts, exactly."""
        return self

    @classmethod
    @cache
    def names(cls) -> tuple[str, ...]:
        """The fields' names."""
        return tuple(f.name for f in fields(cls))

    @classmethod
    @cache
    def paired(cls) -> bool:
        """Whether ``of`` takes what stands beside the rows."""
        return "target" in signature(cls.of).parameters  # type: ignore[attr-defined]

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.names()}

    def __add__(self, other: Self) -> Self:
        mine, theirs = self.tensors(), other.tensors()
        if any(mine[s] is not theirs[s] and not torch.equal(mine[s], theirs[s]) for s in self.shifts):
            theirs = other.about(**{s: mine[s] for s in self.shifts}).tensors()
        return type(self)(**{k: v if k in self.shifts else v + theirs[k] for k, v in mine.items()})

    def take_in(self, other: Self) -> bool:
        """Adds in place where shifts and shapes agree, as they do within a pass; says whether it did."""
        mine, theirs = self.tensors(), other.tensors()
        if any(t is not theirs[k] and (t.shape != theirs[k].shape or k in self.shifts) for k, t in mine.items()):
            return False
        for k, t in mine.items():
            if k not in self.shifts:
                t.add_(theirs[k])
        return True

    def take_rows(self, rows: Rows) -> bool:
        """Adds rows in place where that costs less than a value made of them; says whether it did."""
        return False

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())


class Accumulator:
    """Adds any statistic, in groups of samples: the whole, and the whole but for one group, are sums of the groups'."""

    def __init__(self, statistic: type[Statistic], groups: int = 1):
        self.statistic = statistic
        self.parts: list[Statistic | None] = [None] * groups

    def add(self, value: Statistic, group: int = 0) -> None:
        """Takes a value in, in place: what is held is the accumulator's own, no tensor of it shared with another value."""
        held = self.parts[group]
        if held is None:
            own = {k: t if k in value.shifts else t.clone() for k, t in value.tensors().items()}
            self.parts[group] = type(value)(**own)
        elif not held.take_in(value):
            self.parts[group] = held + value

    def add_rows(self, rows: Rows, group: int = 0) -> None:
        """Takes rows in."""
        held = self.parts[group]
        if held is None or not held.take_rows(rows):
            self.add(self.statistic.of(rows), group)  # type: ignore[attr-defined]

    @property
    def value(self) -> Statistic | None:
        """The whole; None before anything was added."""
        return _sum(self.parts)

    def without(self, group: int) -> Statistic | None:
        """The whole but for one group."""
        return _sum(self.parts[:group] + self.parts[group + 1 :])

    def to(self, device: torch.device) -> None:
        """Moves what is held to a device."""
        state = {k: t.to(device) for k, t in self.state_dict().items()}
        self.load_state_dict(state)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts if part is not None)

    def state_dict(self) -> dict[str, Tensor]:
        """``{group.field: tensor}``: plain tensors, that a weights-only load takes."""
        held = ((g, part) for g, part in enumerate(self.parts) if part is not None)
        return {f"{g}.{name}": t for g, part in held for name, t in part.tensors().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved state. Raises ValueError where it was saved with more groups."""
        by_group: dict[int, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            group, name = key.split(".", 1)
            by_group.setdefault(int(group), {})[name] = tensor
        if by_group and max(by_group) >= len(self.parts):
            raise ValueError(f"the saved state has group {max(by_group)}, here there are {len(self.parts)} groups")
        self.parts = [self.statistic(**by_group[g]) if g in by_group else None for g in range(len(self.parts))]


def _sum(parts: list[Statistic | None]) -> Statistic | None:
    held: list[Any] = [part for part in parts if part is not None]
    return sum(held[1:], held[0]) if held else None
