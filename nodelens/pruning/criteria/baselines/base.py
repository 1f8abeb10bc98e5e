"""What a published criterion is: a group, the model's weights and sums of a pass in, a score a unit out; high means keep."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from nodelens.network.groups import GroupSlice, PruningGroup, Role

from .passes import Need

Kind = Literal["weights", "reads", "maps", "gates", "gradients", "sample_gradients", "training"]


@dataclass(frozen=True)
class Found:
    """What a group is scored by: the model's weights, the seed, and the sums that criteria need."""

    model: nn.Module
    seed: int
    sums: Mapping[Need, Any]


@dataclass(frozen=True)
class Baseline:
    """A published criterion. Options are fields; subclasses state formula and source in their docstring.

    needs: what it reads beside the group: ``weights`` alone; ``reads``, what consumers read; ``maps``, images of it; ``gates``,
    slopes of the loss in gates on units; ``gradients`` of parameters, of all data together or ``sample_gradients``; ``training``.
    P(u) are the rows of weights that make a unit, K(u) the columns that read it; biases and norms are in neither.
    """

    names: ClassVar[tuple[str, ...]] = ()
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # further names, each with options of its own
    needs: ClassVar[Kind] = "weights"
    whole: ClassVar[bool] = False  # whether it scores whole experts though it needs more than weights

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            hint, value = hints[field.name], getattr(self, field.name)
            if get_origin(hint) is Literal and value not in get_args(hint):
                fit = ", ".join(map(repr, get_args(hint)))
                raise ValueError(f"{self.names[0]}: {field.name} is {value!r}; it takes {fit}")

    @property
    def options(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def sums(self) -> tuple[Need, ...]:
        """What a pass has to add up."""
        return ()

    def __call__(self, group: PruningGroup, found: Found) -> Tensor:
        """The score of each unit, (units,) float64 on the CPU."""
        raise TypeError(f"{type(self).__name__} has no formula")

    def check(self, name: str, groups: Sequence[PruningGroup], data: Iterable[Any] | None) -> None:
        """Raises ValueError where data are missing, or a unit cannot be seen where the criterion looks."""
        if self.needs != "weights" and data is None:
            raise ValueError(f"{name} is measured on data: give data=, or a criterion of weights such as magnitude")
        for group in groups:
            if group.router is not None:
                self._check_whole(name, group)
                continue
            slices = group.by_role("producer", "consumer")
            if not group.by_role("producer") or not group.by_role("consumer"):
                raise ValueError(f"{name}: group {group.name!r} has no producer or no consumer: nothing to score its units by")
            known = self.needs != "maps" and all(
                piece.tensor == "down_proj" for piece in group.by_role("consumer")
            )  # by its formula
            if self.needs in ("reads", "maps", "gates") and any(piece.entry is not None for piece in slices) and not known:
                raise ValueError(
                    f"{name} looks at what passes, and no hook sees the units of group {group.name!r}: its experts lie in one "
                    "tensor; score it by weights (magnitude, group_l2), or by gradient or llm_pruner"
                )

    def _check_whole(self, name: str, group: PruningGroup) -> None:
        """Raises ValueError where the criterion is none of whole experts."""
        if self.needs != "weights" and not self.whole:
            raise ValueError(
                f"{name} does not score whole experts, the units of group {group.name!r}: score them by taylor, loss_proxy, "
                "router_load, weights (magnitude, group_l2) or at random, or prune their channels instead, scope=moe_ffn"
            )


def matrices(model: nn.Module, group: PruningGroup, *roles: Role) -> list[GroupSlice]:
    """The slices of weights: a group's without biases."""
    return [piece for piece in group.by_role(*roles) if piece.of(model).ndim > 1]


def entries(piece: GroupSlice, tensor: Tensor) -> Tensor:
    """The units' entries of a tensor in the shape of the one that is cut, (units, the rest)."""
    part = tensor if piece.entry is None else tensor[piece.entry]
    moved = part.movedim(piece.dim - (piece.entry is not None), 0)
    return moved[piece.index.to(part.device)].flatten(1)


def whole(model: nn.Module, piece: GroupSlice) -> Tensor:
    """The tensor that is cut, all experts of it, as the model holds it."""
    return getattr(model.get_submodule(piece.module), piece.tensor)


def added(parts: Iterable[Tensor]) -> Tensor:
    """The sum of parts that may lie on several devices, on the CPU."""
    return torch.stack([part.cpu() for part in parts]).sum(0)
