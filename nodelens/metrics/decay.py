"""How fast the eigenvalues of a layer's covariance decay."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .spectrum import SpectrumMetric

FEWEST = 6  # eigenvalues, at least, for a line fit


@dataclass(frozen=True)
class LogSpectrumSlope(SpectrumMetric):
    """Exponential decay of the spectrum: least-squares slope of ln eigenvalue against its index.

    The fit uses the indices first .. last - 1, counted from 0, of the eigenvalues above 0: directions of constant units, and those
    that rounding hides (``unresolved``), have none. An exponential spectrum exp(-b i) gives -b.

    Formula: cov(i, ln lam_i)/var(i) over indices i, lam the eigenvalues of the covariance, largest first
    Shapes: y over rows of width units -> ()
    Unit:   nats per index, 0 or below; equal eigenvalues: 0
    NaN:    no variance, or fewer than six eigenvalues above 0 in the range
    Raises: ValueError when first is below 0
    Source: Stringer et al. 2019, Nature 571, 361, eigenspectra (there against the logarithm of the rank, see alpha_req)
    """

    names: ClassVar = ("log_spectrum_slope",)
    nan: ClassVar = "no variance, or fewer than six eigenvalues above 0 in the range"
    limits: ClassVar = {"first": (lambda index: index >= 0, "indices count from 0")}
    first: int = 10
    last: int = 200

    def of(self, eigenvalues: Tensor) -> Tensor:
        place, logarithm = self._fitted(eigenvalues)
        return _line(place, logarithm, torch.ones_like(place))[0]

    def _fitted(self, eigenvalues: Tensor) -> tuple[Tensor, Tensor]:
        """The indices in the range and the logarithms of their eigenvalues, (k,) each."""
        high = eigenvalues[eigenvalues > 0][self.first : self.last]
        return torch.arange(self.first, self.first + len(high), dtype=high.dtype, device=high.device), high.log()


@dataclass(frozen=True)
class AlphaReQ(LogSpectrumSlope):
    """Power-law decay of the spectrum: exponent alpha of the eigenvalues, lam_r proportional to r^-alpha at rank r.

    As in the source, ranks are weighted by 1/r, and the first ten are left out, because they seldom follow the power law; it also
    uses ranks 5 to 50 (``first: 4``). ``value: r2`` is the share of the weighted variance of ln lam that the line explains: check
    it first. ``value: slope`` is -alpha. ``weights: none`` weights all ranks alike; with ``value: slope`` and ``last: 200`` it
    gives the value of nodelens before alpha_req followed its source. Which eigenvalues count is as in log_spectrum_slope.

    Formula: -cov(ln r, ln lam_r)/var(ln r) with weights 1/r over ranks r = first + 1 .. last, lam the covariance's eigenvalues
    Shapes: y over rows of width units -> ()
    Unit:   none, 0 or above; lam_r = r^-1.2: 1.2; r2 in [0, 1]
    NaN:    no variance, or fewer than six eigenvalues above 0 in the range; r2: equal eigenvalues
    Raises: ValueError when first is below 0
    Source: Agrawal et al. 2022, NeurIPS, alpha-ReQ, section 2, with the fit of Stringer et al. 2019, Nature 571, 361
    """

    names: ClassVar = ("alpha_req",)
    presets: ClassVar = {"alpha_req_r2": {"value": "r2"}}
    last: int = 50
    value: Literal["alpha", "slope", "r2"] = "alpha"
    weights: Literal["rank", "none"] = "rank"

    def of(self, eigenvalues: Tensor) -> Tensor:
        place, logarithm = self._fitted(eigenvalues)
        rank = place + 1
        slope, r2 = _line(rank.log(), logarithm, 1 / rank if self.weights == "rank" else torch.ones_like(rank))
        return {"alpha": -slope, "slope": slope, "r2": r2}[self.value]


def _line(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and r^2 of y against x, both (k,), by weighted least squares; NaN for fewer than six points."""
    if len(x) < FEWEST:
        return x.new_full((), torch.nan), x.new_full((), torch.nan)
    share = weights / weights.sum()
    x, y = x - share @ x, y - share @ y
    slope = (share * x) @ y / ((share * x) @ x)
    return slope, slope.square() * ((share * x) @ x) / ((share * y) @ y)
