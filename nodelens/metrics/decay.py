"""How fast the eigenvalues of a layer's covariance decay."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .spectrum import SpectrumMetric

SMALLEST = 1e-12  # of the largest eigenvalue: below it, a logarithm is rounding error
FEWEST = 6  # eigenvalues, at least, for a line fit


@dataclass(frozen=True)
class LogSpectrumSlope(SpectrumMetric):
    """Exponential decay of the spectrum: least-squares slope of ln eigenvalue against its index.

    The fit uses the indices first .. min(last, units) - 1, counted from 0. An exponential spectrum exp(-b i) gives -b.

    Formula: cov(i, ln lam_i)/var(i) over indices i, lam the eigenvalues of the covariance, largest first
    Shapes: y over rows of width units -> ()
    Unit:   nats per index, 0 or below; equal eigenvalues: 0
    NaN:    no variance, fewer than six eigenvalues in the range, or one of them at most 1e-12 of the largest
    Raises: ValueError when first is below 0
    Source: Stringer et al. 2019, Nature 571, 361, eigenspectra (there against the logarithm of the rank, see alpha_req)
    """

    names: ClassVar = ("log_spectrum_slope",)
    nan: ClassVar = "no variance, fewer than six eigenvalues in the range, or one of them at most 1e-12 of the largest"
    first: int = 10
    last: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first < 0:
            raise ValueError(f"{self.names[0]}: first is {self.first}; indices count from 0")

    def of(self, eigenvalues: Tensor) -> Tensor:
        return _line(eigenvalues, self.first, self.last, logarithm=False)[0]


@dataclass(frozen=True)
class AlphaReQ(LogSpectrumSlope):
    """Power-law decay of the spectrum: least-squares slope of ln eigenvalue against ln rank.

    The range is that of log_spectrum_slope; it omits the first eigenvalues, which seldom follow the power law. The source's alpha
    is minus this slope. ``value: r2`` is the share of the variance of ln lam that the line explains: check it first.

    Formula: cov(ln r, ln lam_r)/var(ln r) over ranks r = first + 1 .. min(last, units), lam the covariance's eigenvalues
    Shapes: y over rows of width units -> ()
    Unit:   none, 0 or below; lam_r = r^-1.2: -1.2; r2 in [0, 1]
    NaN:    no variance, fewer than six eigenvalues in the range, or one of them at most 1e-12 of the largest; r2: equal eigenvalues
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
    """Slope and r^2 of ln eigenvalue against index, or against ln rank; NaN where no line can be fitted."""
    high = eigenvalues[first:last]
    if len(high) < FEWEST or not (high > SMALLEST * eigenvalues[0]).all():
        return eigenvalues.new_full((), torch.nan), eigenvalues.new_full((), torch.nan)
    place = torch.arange(first, first + len(high), dtype=high.dtype, device=high.device)
    x = (place + 1).log() if logarithm else place
    x, y = x - x.mean(), high.log() - high.log().mean()
    slope = (x @ y) / (x @ x)
    return slope, slope.square() * (x @ x) / (y @ y)
