"""Pruning criterion for whole experts: how many tokens the router sends to each."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nodelens.statistics import Moments

from .base import Metric
from .need import Need


@dataclass(frozen=True)
class RouterLoad(Metric):
    """Share of the token assignments of a mixture that go to an expert: pruning removes the least used expert first.

    Formula: n_e / sum of n over experts, n_e the number of tokens with e among their k experts
    Shapes: ids of the experts chosen for each token -> (experts,)
    Unit:   none, in [0, 1/k]; 1/E for equal load of E experts
    NaN:    a mixture that gets no token
    Raises: ValueError for units that are not whole experts
    Source: Fedus, Zoph & Shazeer 2022, 2101.03961, eq. 5 (the load)
    """

    names: ClassVar = ("router_load",)
    whole_experts: ClassVar = True

    def needs(self) -> dict[str, Need]:
        return {"load": Need(Moments, "load")}

    def __call__(self, weight: Tensor | None, load: Moments) -> Tensor:
        return load.mean / load.mean.sum()
