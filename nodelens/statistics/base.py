"""The base class of all statistics (sums over rows, as immutable values) and the accumulator that adds them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, wraps
from inspect import signature
from typing import Any, ClassVar, Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Statistic:
    """Sums over rows: the statistics of the parts of any split add up to the statistic of the whole.

    A subclass is a frozen dataclass of tensors, each with at least one dimension, of float64 or whole numbers. ``of`` computes it
    from rows. If its sums are taken about a shift, ``about`` converts them exactly to another shift.
    """

    shifts: ClassVar[tuple[str, ...]] = ()
    maxima: ClassVar[tuple[str, ...]] = ()  # fields of which the larger value is kept, instead of the sum
    by_sample: ClassVar[str | None] = None  # the per-sample sums that it needs, besides the plain sum
    by_row: ClassVar[tuple[str, ...]] = ()  # sums that it reads of whole rows, computed with those of the samples
    entries: ClassVar[bool] = False  # whether its rows are the inputs of each unit (patches of a convolution)
    takes_hashes: ClassVar[bool] = False  # whether ``of`` takes sample hashes
    merged: ClassVar[bool] = False  # whether ``+`` is not a field-by-field sum

    def about(self, **shifts: Tensor) -> Self:
        """The same sums about other shifts, exactly."""
        return self

    def _moved(self, shifts: Mapping[str, Tensor]) -> Self:
        """The same sums about these shifts; the statistic itself if it has them."""
        if all(getattr(self, name) is shift for name, shift in shifts.items()):
            return self
        same = all(torch.equal(getattr(self, name), shift) for name, shift in shifts.items())
        return replace(self, **shifts) if same else self.about(**shifts)

    @classmethod
    @cache
    def names(cls) -> tuple[str, ...]:
        """The names of the fields."""
        return tuple(f.name for f in fields(cls))

    @classmethod
    @cache
    def paired(cls) -> bool:
        """Whether ``of`` takes a paired target."""
        return "target" in signature(cls.of).parameters  # type: ignore[attr-defined]

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.names()}

    def __add__(self, other: Self) -> Self:
        mine, theirs = self.tensors(), other.tensors()
        if any(mine[s] is not theirs[s] and not torch.equal(mine[s], theirs[s]) for s in self.shifts):
            theirs = other.about(**{s: mine[s] for s in self.shifts}).tensors()
        added = {k: v + theirs[k] for k, v in mine.items() if k not in (*self.shifts, *self.maxima)}
        return type(self)(**mine | added | {k: torch.maximum(mine[k], theirs[k]) for k in self.maxima})

    def add_in_place(self, other: Self) -> bool:
        """Add in place if shifts and shapes agree, as they do within a pass; returns whether it did."""
        mine, theirs = self.tensors(), other.tensors()
        if any(t is not theirs[k] and (t.shape != theirs[k].shape or k in self.shifts) for k, t in mine.items()):
            return False
        for k, t in mine.items():
            if k in self.maxima:
                torch.maximum(t, theirs[k], out=t)
            elif k not in self.shifts:
                t.add_(theirs[k])
        return True

    @classmethod
    def aligned(cls, parts: Sequence[Self]) -> list[Self]:
        """The same parts about the shifts of the first one, so that they add field by field."""
        shifts = {name: getattr(parts[0], name) for name in cls.shifts}
        return [part._moved(shifts) for part in parts] if shifts else [*parts]

    @classmethod
    def added(cls, parts: Sequence[Self]) -> Self:
        """The sum of two or more parts, in their order."""
        found = cls._by_field(parts) if cls.add_in_place is Statistic.add_in_place else None
        if found is not None:
            return found
        total = parts[0] + parts[1]
        for part in parts[2:]:  # into the same memory, where shapes and shifts agree
            total = total if total.add_in_place(part) else total + part
        return total

    @classmethod
    def _by_field(cls, parts: Sequence[Self]) -> Self | None:
        """The same with one addition per field, if shifts are the same and shapes agree, as they do within a pass."""
        found = {}
        for name in cls.names():
            first, *others = [getattr(part, name) for part in parts]
            if name in cls.shifts and all(each is first for each in others):
                found[name] = first
            elif name in cls.shifts or any(each.shape != first.shape for each in others):
                return None
            else:
                add = torch.maximum if name in cls.maxima else torch.add
                total = found[name] = add(first, others[0])
                for each in others[1:]:
                    add(total, each, out=total)
        return cls(**found)

    def add_rows_in_place(self, rows: Any, *target: Tensor) -> bool:
        """Add rows in place if that is cheaper than computing their statistic first; returns whether it did."""
        return False

    def widest(self) -> Self:
        """The same sums in dtypes that hold those of any number of rows."""
        return self

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())


def derived(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps what a function of a statistic returns with the statistic, for all metrics that read the same sums.

    The function takes a statistic, and hashable arguments by position, none of which has a default. Nothing may write into what
    it returns.
    """

    @wraps(function)
    def kept(statistic: Statistic, *arguments: Any) -> Any:
        values = statistic.__dict__.setdefault("_derived", {})
        key = (kept, *arguments)
        if key not in values:
            values[key] = function(statistic, *arguments)
        return values[key]

    return kept


def is_derived(function: Callable[..., Any], statistic: Statistic, *arguments: Any) -> bool:
    """Whether a statistic already holds what a ``derived`` function returns."""
    return (function, *arguments) in statistic.__dict__.get("_derived", {})


class Accumulator:
    """Adds any statistic per jackknife group of samples; the whole, and the whole without one group, are sums over groups."""

    def __init__(self, statistic: type[Statistic], groups: int = 1):
        self.statistic = statistic
        self.parts: list[Statistic | None] = [None] * groups

    def add(self, value: Statistic, group: int = 0) -> None:
        """Add a value in place. The accumulator owns its tensors and shares none of them with the value."""
        held = self._writable(group)
        if held is None:
            own = {k: t if k in value.shifts else t.clone() for k, t in value.tensors().items()}
            self.parts[group] = type(value)(**own)
        elif not held.add_in_place(value):
            self.parts[group] = held + value

    def add_rows(self, rows: Any, group: int = 0, *target: Tensor) -> None:
        """Add the statistic of rows, and of their targets if it takes any."""
        held = self._writable(group)
        if held is None or not held.add_rows_in_place(rows, *target):
            self.add(self.statistic.of(rows, *target), group)  # type: ignore[attr-defined]

    def _writable(self, group: int) -> Statistic | None:
        """The sums of a group, without what was derived from them, which no longer holds once they are added to."""
        held = self.parts[group]
        if held is not None:
            held.__dict__.pop("_derived", None)
        return held

    @property
    def value(self) -> Statistic | None:
        """The sum over all groups; None before anything was added."""
        return _sum(self._aligned())

    def without(self, group: int) -> Statistic | None:
        """The sum over all groups but one."""
        parts = self._aligned()
        return _sum(parts[:group] + parts[group + 1 :])

    def _aligned(self) -> list[Statistic | None]:
        """The parts, aligned and kept so, because many sums are formed of the same parts."""
        held: list[Any] = [part for part in self.parts if part is not None]
        if held:
            ready = iter(type(held[0]).aligned(held))
            self.parts = [None if part is None else next(ready) for part in self.parts]
        return self.parts

    def to(self, device: torch.device) -> None:
        """Move all sums to a device."""
        state = {k: t.to(device) for k, t in self.state_dict().items()}
        self.load_state_dict(state)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts if part is not None)

    def state_dict(self) -> dict[str, Tensor]:
        """``{group.field: tensor}``: plain tensors, which ``torch.load(weights_only=True)`` accepts."""
        held = ((g, part) for g, part in enumerate(self.parts) if part is not None)
        return {f"{g}.{name}": t for g, part in held for name, t in part.tensors().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a saved state. Raises ValueError if it was saved with more groups."""
        by_group: dict[int, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            group, name = key.split(".", 1)
            by_group.setdefault(int(group), {})[name] = tensor
        if by_group and max(by_group) >= len(self.parts):
            raise ValueError(f"the saved state has group {max(by_group)}, but this accumulator has {len(self.parts)} groups")
        self.parts = [self.statistic(**by_group[g]) if g in by_group else None for g in range(len(self.parts))]


def _sum(parts: list[Statistic | None]) -> Statistic | None:
    held: list[Any] = [part for part in parts if part is not None]
    if len(held) < 2:
        return replace(held[0]) if held else None  # a copy, so that what is derived from the sum goes with the sum
    return type(held[0]).added(held)
