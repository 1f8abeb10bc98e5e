"""The criterion of routers: how many tokens an expert gets."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...experts import Call
from ..axis import Axis
from .base import Baseline, Found
from .passes import Need, Sums, counted


class LoadSums(Sums):
    """Counts of the tokens, not padded, that go to each expert of a mixture."""

    def __init__(self, model: nn.Module, axes: Sequence[Axis]):
        super().__init__(model, axes)
        self.names = {axis.by_role("producer")[0].module: axis.name for axis in axes if axis.router is not None}
        self.mixtures = list(self.names)
        self.totals = {axis.name: self.zeros(axis.n) for axis in axes if axis.router is not None}

    def called(self, path: str, call: Call) -> None:
        keep = counted(call, self.frame).flatten()
        got = [call.share(expert).only(keep).tokens.numel() for expert in range(len(call.experts))]
        self.totals[self.names[path]] += torch.tensor(got, device=self.device)


@dataclass(frozen=True)
class RouterLoad(Baseline):
    """Share of a mixture's assignments that go to an expert: the least used goes first.

    Formula: n_e / sum of n over experts, n_e the tokens of which e is one of the k chosen
    Shapes: ids of experts that tokens go to -> (experts,)
    Unit:   none, in [0, 1/k]; 1/E where all get as many
    NaN:    a mixture that gets no token
    Raises: ValueError for units that are not whole experts
    Source: Fedus, Zoph & Shazeer 2022, 2101.03961, eq. 5 (the load)
    """

    names: ClassVar = ("router_load",)
    needs: ClassVar = "reads"
    whole: ClassVar = True

    def sums(self) -> tuple[Need, ...]:
        return (Need(LoadSums),)

    def check(self, name: str, axes: Sequence[Axis], data: Iterable[Any] | None) -> None:
        super().check(name, axes, data)
        other = next((axis for axis in axes if axis.router is None), None)
        if other is not None:
            raise ValueError(f"{name} scores whole experts, scope=expert; axis {other.name!r} has other units ({other.kind})")

    def __call__(self, axis: Axis, found: Found) -> Tensor:
        counts = found.sums[Need(LoadSums)].totals[axis.name]
        return (counts / counts.sum()).cpu()


BASELINES: tuple[type[Baseline], ...] = (RouterLoad,)
