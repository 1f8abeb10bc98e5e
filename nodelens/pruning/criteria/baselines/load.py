"""The criterion of routers: how many tokens an expert gets."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nodelens.network.experts import Call
from nodelens.network.groups import PruningGroup

from .base import Baseline, Found
from .passes import Need, Sums, counted


class LoadSums(Sums):
    """Counts of the tokens, not padded, that go to each expert of a mixture."""

    def __init__(self, model: nn.Module, groups: Sequence[PruningGroup]):
        super().__init__(model, groups)
        self.names = {group.by_role("producer")[0].module: group.name for group in groups if group.router is not None}
        self.mixtures = list(self.names)
        self.totals = {group.name: self.zeros(group.n) for group in groups if group.router is not None}

    def called(self, path: str, call: Call) -> None:
        keep = counted(call, self.batch).flatten()
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

    def check(self, name: str, groups: Sequence[PruningGroup], data: Iterable[Any] | None) -> None:
        super().check(name, groups, data)
        other = next((group for group in groups if group.router is None), None)
        if other is not None:
            raise ValueError(f"{name} scores whole experts, scope=expert; group {other.name!r} has other units ({other.kind})")

    def __call__(self, group: PruningGroup, found: Found) -> Tensor:
        counts = found.sums[Need(LoadSums)].totals[group.name]
        return (counts / counts.sum()).cpu()


BASELINES: tuple[type[Baseline], ...] = (RouterLoad,)
