"""How fast a layer's spectrum falls."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .base import Metric
from .spectrum import SpectrumMetric

SMALLEST = 1e-12  # of the largest eigenvalue: below, a logarithm says nothing
FEWEST = 6  # eigenvalues that a line is put through


@dataclass(frozen=True)
class LogSpectrumSlope(SpectrumMetric):
    """How fast the spectrum falls: slope of the line through ln eigenvalue over place, by least squares.

    Places first .. min(last, units) - 1, counted from 0. An exponential spectrum exp(-b i) reads -b.

    Formula: cov(i, ln lam_i)/var(i) over places i, lam the eigenvalues of the covariance, largest first
    Shapes: y over rows of width units -> ()
    Unit:   nats a place, 0 or below; equal eigenvalues: 0
    NaN:    no variance, fewer than six eigenvalues in the range, or one in it at 1e-12 of the largest or below
    Raises: ValueError when first is below 0
    Source: Stringer et al. 2019, Nature 571, 361, eigenspectra (there over ln place, see alpha_req)
    """

    names: ClassVar = ("log_spectrum_slope",)
    nan: ClassVar = "no variance, fewer than six eigenvalues in range, or one in it of 1e-12 of the largest"
    first: int = 10
    last: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first < 0:
            raise ValueError(f"{self.names[0]}: first is {self.first}; places count from 0")

    def of(self, eigenvalues: Tensor) -> Tensor:
        return _line(eigenvalues, self.first, self.last, logarithm=False)[0]


@dataclass(frozen=True)
class AlphaReQ(LogSpectrumSlope):
    """How fast the spectrum falls as a power of the rank: slope of the line through ln eigenvalue over ln rank.

    Over the places of log_spectrum_slope; the first ones, which seldom lie on the line, are left out. The source's alpha is
    minus this slope. ``value: r2`` is the share of the variance of ln lam that the line explains: look there first.

    Formula: cov(ln r, ln lam_r)/var(ln r) over ranks r = first + 1 .. min(last, units), lam the covariance's eigenvalues
    Shapes: y over rows of width units -> ()
    Unit:   none, 0 or below; lam_r = r^-1.2: -1.2; r2 in [0, 1]
    NaN:    no variance, fewer than six eigenvalues in the range, or one in it at 1e-12 of the largest or below; r2 of equal ones
    Raises: ValueError when first is below 0
    Source: Agrawal et al. 2022, NeurIPS, alpha-ReQ, section 2
    """

    names: ClassVar = ("alpha_req",)
    presets: ClassVar = {"alpha_req_r2": {"value": "r2"}}
    value: Literal["slope", "r2"] = "slope"

    def of(self, eigenvalues: Tensor) -> Tensor:
        slope, r2 = _line(eigenvalues, self.first, self.last, logarithm=True)
        return slope if self.value == "slope" else r2


def _line(eigenvalues: Tensor, first: int, last: int, logarithm: bool) -> tuple[Tensor, Tensor]:
    """Slope and r^2 of ln eigenvalue over place, or over ln rank; NaN where there is no line."""
    high = eigenvalues[first:last]
    if len(high) < FEWEST or not (high > SMALLEST * eigenvalues[0]).all():
        return eigenvalues.new_full((), torch.nan), eigenvalues.new_full((), torch.nan)
    place = torch.arange(first, first + len(high), dtype=high.dtype, device=high.device)
    x = (place + 1).log() if logarithm else place
    x, y = x - x.mean(), high.log() - high.log().mean()
    slope = (x @ y) / (x @ x)
    return slope, slope.square() * (x @ x) / (y @ y)


METRICS: tuple[type[Metric], ...] = (LogSpectrumSlope, AlphaReQ)
