"""The criterion of routers: how many tokens a whole expert gets."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nodelens.statistics import Moments

from .base import Metric
from .need import Need


@dataclass(frozen=True)
class RouterLoad(Metric):
    """Share of a mixture's assignments that go to an expert: the least used goes first.

    Formula: n_e / sum of n over experts, n_e the tokens of which e is one of the k chosen
    Shapes: ids of experts that tokens go to -> (experts,)
    Unit:   none, in [0, 1/k]; 1/E where all get as many
    NaN:    a mixture that gets no token
    Raises: ValueError for units that are not whole experts
    Source: Fedus, Zoph & Shazeer 2022, 2101.03961, eq. 5 (the load)
    """

    names: ClassVar = ("router_load",)
    nan: ClassVar = "a mixture that gets no token"
    whole_experts: ClassVar = True

    def needs(self) -> dict[str, Need]:
        return {"load": Need(Moments, "load")}

    def __call__(self, weight: Tensor | None, load: Moments) -> Tensor:
        return load.mean / load.mean.sum()


METRICS: tuple[type[Metric], ...] = (RouterLoad,)
