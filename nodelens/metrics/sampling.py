"""Effective sample size: positions of an image and tokens of a text are not independent rows."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nodelens.statistics import Moments

from .base import Metric
from .need import Need, View

FEWEST = 4  # groups of samples


@dataclass(frozen=True)
class EffectiveSampleSize(Metric):
    """Number of independent rows that would estimate a unit's mean as precisely as the given rows.

    Positions or tokens of one sample are correlated: use this number instead of the number of rows as n in closed forms of bias and
    error. It is estimated from 8 groups of samples, to within about a factor of two; the median over the units of a layer varies
    less. Over G groups of independent rows, the mean of 1/SE_J^2 is (G - 1)/(G - 3) too large, which the formula corrects. The
    value may exceed the number of rows where rows are negatively correlated.

    Formula: n_eff = (G - 3)/(G - 1) Var y / SE_J(E y)^2, SE_J the jackknife's standard error of the mean over G groups of samples
    Shapes: y over rows of width units, by group of samples -> (units,)
    Unit:   rows, > 0; independent rows: about n; maps that are constant over positions: the number of samples
    NaN:    fewer than four groups of samples, or a constant unit
    Source: n SE_iid^2 / SE_J^2 with SE_iid^2 = Var y / n; Kish 1965, Survey Sampling, section 8.2 (design effect); the factor is
            the mean of an inverse chi-squared variable with G - 1 degrees of freedom
    """

    names: ClassVar = ("effective_sample_size", "n_eff")
    grouped: ClassVar = True
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Moments, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: list[Moments]) -> Tensor:
        whole = sum(y[1:], y[0])
        if len(y) < FEWEST:
            return torch.full_like(whole.mean, torch.nan)
        n = torch.stack([part.n for part in y]).double()  # (groups, 1)
        left = (whole.n * whole.mean - n * torch.stack([part.mean for part in y])) / (whole.n - n)
        error = jackknife(whole.mean, left, n[:, 0])[0]
        free = (len(y) - 3) / (len(y) - 1)
        return (free * whole.variance / error.square()).where(whole.variance > 0, torch.nan)


def jackknife(value: Tensor, left: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Standard error and bias of a value, from the values with each of G groups left out; groups may be unequal.

    Shapes: value (...), left (G, ...), weights (G,), number of samples or rows of each group -> (...), (...)
    Source: Busing, Meijer & van der Leeden 1999, Statistics and Computing 9:3-8, eqs. 2 and 3; equal groups give
            sqrt((G - 1)/G sum (left - mean)^2) and (G - 1)(mean - value), Tukey 1958
    """
    shape = (-1, *[1] * value.ndim)
    h = (weights.sum() / weights.double()).reshape(shape)
    mean = len(left) * value - ((1 - 1 / h) * left).sum(0)
    pseudo = h * value - (h - 1) * left
    return ((pseudo - mean).square() / (h - 1)).mean(0).sqrt(), value - mean
