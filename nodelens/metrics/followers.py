"""Redundancy with a direction: of two units that say the same, the one that varies less repeats the other."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nodelens.statistics import Gram

from .base import Metric, mean_of_partners
from .covariances import constant_units, correlation_of
from .information import pair_information
from .need import Need, View


def leads(y: Gram) -> Tensor:
    """1 where unit j varies more than unit i, 1/2 where both vary alike, else 0, (units i, units j) float64, diagonal 0."""
    variance = y.covariance.diagonal()
    more = variance > variance[:, None]
    return (more.double() + (1 - more.double() - more.T.double()) / 2).fill_diagonal_(0)


@dataclass(frozen=True)
class DirectedRedundancy(Metric):
    """Redundancy of a unit with the units that vary more than it does: what stronger units say already.

    Of two copies of different size only the smaller one is redundant, where ``redundancy`` is high for both. Constant units have 0
    and are counted (``constant``). ``reduce: none`` gives the matrix, whose entry (i, j) is what unit i repeats of unit j.

    Formula: mean over j != i of -0.5 ln(1 - rho_ij^2) [var y_j > var y_i], rho_ij = corr(y_i, y_j); a half at equal variances
    Shapes: y over rows of width units -> (units,), or (units, units) with ``reduce: none``
    Unit:   nats, in [0, 6.908]; the matrix plus its transpose is that of redundancy
    NaN:    fewer than two rows (three with a bias correction); the mean in a layer of one unit
    Source: definition; information: Cover & Thomas 2006, Elements of Information Theory, ch. 8
    """

    names: ClassVar = ("directed_redundancy",)
    kind: ClassVar = "pair"
    nan: ClassVar = "fewer than two rows (three with a bias correction), or a layer of one unit"
    higher_is_better: ClassVar = False
    reduce: Literal["mean", "none"] = "mean"
    view: View = "positions"
    bias: Literal["none", "gaussian"] = "none"

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Gram, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Gram) -> Tensor:
        pairs = pair_information(y, self.bias) * leads(y)
        return mean_of_partners(pairs) if self.reduce == "mean" else pairs

    def counts(self, weight: Tensor | None, y: Gram) -> dict[str, int]:
        return {"constant": int(constant_units(y).sum())}


@dataclass(frozen=True)
class FollowerFraction(Metric):
    """Share of the other units that follow a unit: they vary less, and correlate with it strongly.

    A unit with many followers leads a group of redundant units, and can stay where its followers go. Constant units follow none.

    Formula: #{j != i: |corr(y_i, y_j)| >= threshold, var y_j < var y_i} / (N - 1), N units; equal variances count a half
    Shapes: y over rows of width units -> (units,)
    Unit:   none, in [0, 1]
    NaN:    fewer than two rows; a layer of one unit
    Raises: ValueError for a threshold that is not in (0, 1]
    Source: definition
    """

    names: ClassVar = ("follower_fraction",)
    kind: ClassVar = "unit"
    nan: ClassVar = "fewer than two rows, or a layer of one unit"
    limits: ClassVar = {"threshold": (lambda size: 0 < size <= 1, "it is an absolute correlation, above 0 and at most 1")}
    threshold: float = 0.5
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Gram, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Gram) -> Tensor:
        rho = correlation_of(y).abs().fill_diagonal_(0)
        follow = (rho >= self.threshold * (1 - 1e-12)) * leads(y).T
        return mean_of_partners(follow.where(rho.isfinite(), torch.nan).fill_diagonal_(0))

    def counts(self, weight: Tensor | None, y: Gram) -> dict[str, Any]:
        return {"constant": int(constant_units(y).sum())}
