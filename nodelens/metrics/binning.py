"""Mutual information without a Gaussian assumption: histograms with bins of equal width."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nodelens.statistics import Sample
from nodelens.statistics.linalg import constant

from .base import Metric
from .need import Need, Target
from .paired_target import check_target, stored_target, with_permutations


@dataclass(frozen=True)
class BinnedInformation(Metric):
    """Mutual information of a unit and a target, from a histogram of both with bins of equal width.

    It detects nonlinear dependence, which the Gaussian estimate misses. One extreme value widens all bins. The estimate uses at
    most 2,048 samples. Their choice depends on the content of the samples only, not on batches or their order, and
    ``rows_left_out`` counts the others. For several target columns, the value is the mean over columns. Targets are those of
    mutual_information_gaussian. Plug-in entropies (``bias: none``) are too small, so that independent variables give about
    (bins - 1)^2/(2n). ``bias: grassberger`` corrects the entropies: with 400 samples, independent normal variables give 0.01
    rather than 0.09, and a correlation of 0.5 gives 12 % too much rather than 63 %. With fewer samples more bias remains.

    Formula: H(a) + H(b) - H(a, b), a the bin of the unit, b that of the target, H = ln n - sum_k n_k G(n_k)/n, n_k the number of
             samples in cell k, G(m) = psi(m) + (-1)^m [psi((m+1)/2) - psi(m/2)]/2, psi digamma; bias none: G(m) = ln m
    Shapes: y over rows of width units, paired with a target -> (units,)
    Unit:   nats, from about 0 to about ln bins; a unit determined by the target, with equally full bins: ln 10 = 2.3026
    NaN:    fewer than two samples
    Raises: ValueError for an unknown target, fewer than two bins, or missing labels or logits that the target needs
    Source: Grassberger 2003, physics/0307138; plug-in bias: Panzeri & Treves 1996, Network 7:87, eq. 10
    """

    names: ClassVar = ("mutual_information_binning", "mi_binning")
    target: Target = "auto"
    bins: int = 10
    bias: Literal["grassberger", "none"] = "grassberger"
    permutations: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_target(self.names[0], self.target, self.permutations)
        check_bins(self.names[0], self.bins)

    def needs(self) -> dict[str, Need]:
        target = stored_target(self.target)
        return with_permutations({"y": Need(Sample, "output", "samples", target)}, self.permutations, target)

    def __call__(self, weight: Tensor | None, y: Sample, **_: Any) -> Tensor:
        z = first_axis(y.target) if self.target == "logit_pc1" else y.target
        if len(y.rows) < 2:
            return y.rows.new_full(y.rows.shape[1:], torch.nan)
        columns, corrected = bins_of(z, self.bins).unbind(1), self.bias != "none"
        return torch.stack([binned_information(y.rows, column, self.bins, self.bins, corrected) for column in columns]).mean(0)

    def counts(self, weight: Tensor | None, y: Sample, **_: Any) -> dict[str, int]:
        return {"constant": int(constant_columns(y.rows).sum()), "rows_left_out": int(y.seen) - len(y.rows)}


def check_bins(metric: str, bins: int) -> None:
    """Raises ValueError for fewer than two bins."""
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 2:
        raise ValueError(f"{metric}: bins is {bins!r}; it must be a whole number, 2 or more")


def first_axis(z: Tensor) -> Tensor:
    """Centred rows (n, t) projected onto their first principal axis, (n, 1)."""
    centred = z - z.mean(0)
    return centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:1].T if len(z) else centred[:, :1]


def constant_columns(x: Tensor) -> Tensor:
    """Which columns are constant, (n, d) -> (d,) bool."""
    return constant(x.var(0), x.mean(0)) if len(x) > 1 else torch.ones_like(x[:1].sum(0), dtype=torch.bool)


def bins_of(x: Tensor, bins: int) -> Tensor:
    """The bin of each entry, with bins between the smallest and largest value of its column, (n, d) -> (n, d) int64."""
    low, high = x.amin(0), x.amax(0)
    width = torch.where(high > low, high - low, 1.0)
    return ((x - low) / width * bins).long().clamp_max(bins - 1)


def binned_information(x: Tensor, among: Tensor, bins: int, kinds: int, corrected: bool = False) -> Tensor:
    """Information of each binned column about the category of a row: (n, d), (n,) int64 -> (d,); 0 for constant columns.

    Plug-in estimate, or with Grassberger's correction of the entropies.
    """
    d = x.shape[1]
    place = (torch.arange(d, device=x.device) * kinds + among[:, None]) * bins + bins_of(x, bins)
    cells = torch.bincount(place.flatten(), minlength=d * kinds * bins).reshape(d, kinds, bins)
    entropy = (_corrected_entropy if corrected else _plug_in_entropy)(len(x), x.device)
    value = entropy(cells.sum(1)) + entropy(cells.sum(2)) - entropy(cells.flatten(1))
    informative = ~constant_columns(x) & (among != among[:1]).any()
    return value.where(informative, 0.0)


def _plug_in_entropy(n: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Entropy of the shares of counts that add up to n, (d, cells) int64 -> (d,)."""
    terms = torch.special.entr(torch.arange(n + 1, dtype=torch.float64, device=device) / n)
    return lambda counts: terms[counts].sum(1)


def _corrected_entropy(n: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The same with little bias. Grassberger 2003, physics/0307138."""
    counts = torch.arange(n + 1, device=device)
    m = counts.clamp_min(1).double()
    sign = 1 - 2 * (counts % 2)
    g = torch.digamma(m) + 0.5 * sign * (torch.digamma((m + 1) / 2) - torch.digamma(m / 2))
    terms = counts * g
    return lambda counts: math.log(n) - terms[counts].sum(1) / n
