"""Information that two units together carry about the class."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nodelens.statistics import ByClass, ClassGram, Gram, Sample
from nodelens.statistics.linalg import gaussian_information

from .base import Metric, mean_of_partners
from .binning import check_bins, constant_columns
from .classes import SMALLEST_VARIANCE, entropy, labelled
from .covariances import constant_units
from .need import Need
from .pair_bins import class_information_of_pairs, quantile_bins
from .paired_target import COLLINEAR, check_same_rows, check_target, with_permutations

FEWEST = 4  # rows of a class, below which the covariance of two units cannot be estimated
Part = tuple[float, Tensor]  # a class's share of the rows, its covariance (units, units)


@dataclass(frozen=True)
class ClassSynergy(Metric):
    """Information that two units together carry about the class beyond the more informative one, for ALL pairs.

    ``method: binning`` uses histograms of at most 2,048 samples (``rows_left_out``) in which each of the ``bins`` of a unit has
    about the same share of the rows. It is never negative and never exceeds H(class), the entropy of the class. Behind a ReLU it
    ranks pairs as the nearest-neighbour estimate of Ross (2014) for two units does: on three layers of two trained networks
    (ResNet-20, LeNet-5) the rank correlation is 0.90 to 0.97, that of ``method: gaussian`` 0.16 to 0.74 per class and 0.42 to
    0.86 pooled. It is biased upwards: two units that are independent of K classes have about (K - 1)(bins^2 - bins)/(2n).

    ``method: gaussian`` treats the units as Gaussian within classes and overall. It uses the same estimator for one unit and for
    two, so with ddof 0 the value is never negative. ``covariance: per_class`` estimates one covariance per class and leaves out
    classes with fewer than four rows. ``pooled`` estimates one for all classes, which needs less memory. If a unit is almost
    constant within a class, or two units are almost collinear within one (1 - rho^2 < 1e-6), noise of 1e-6 of their variance is
    added to the total and to every class (``degenerate``). Units that are collinear over all rows have a synergy of 0
    (``collinear``). ``above_entropy`` counts the pairs whose joint information exceeds H(class). Rows without a label are left out
    of both methods.

    Formula: S_ij = I_ij - max(I_i, I_j); binning: I_A = H(c) + H(A) - H(A, c), H the entropy of the class c and of the bins of the
             units A; gaussian: I_A = 0.5 [ln det S_A - sum_c p_c ln det S_A,c], S_A the covariance of the units A over all rows,
             S_A,c that within class c, p_c its share of the rows; pooled: sum_c p_c S_A,c in place of each S_A,c
    Shapes: y over rows of width units, by class -> (units,) or (units, units)
    Unit:   nats, 0 and above, with binning at most H(class); two classes of equal size with correlations +-0.8: gaussian 0.5108;
            pooled: 0
    NaN:    binning: fewer than two rows; per_class: no class has four rows; pooled: fewer than two rows, or with ddof 1 no more
            rows than classes; the mean in a layer of one unit
    Raises: ValueError when there are no labels, for fewer than two bins, and for ``covariance: pooled`` with binning
    Source: definition of the synergy: Barrett 2015, Phys. Rev. E 91, 052802, 1411.2832, section IV; Cover & Thomas 2006, theorem
            8.4.1; compared with Ross 2014, PLoS ONE 9:e87357
    """

    names: ClassVar = ("class_synergy",)
    kind: ClassVar = "pair"
    nan: ClassVar = "fewer than two rows (gaussian: no class has four rows; pooled: too few rows), or a layer of one unit"
    method: Literal["binning", "gaussian"] = "binning"
    bins: int = 6
    covariance: Literal["per_class", "pooled"] = "per_class"
    ddof: Literal[0, 1] = 0
    reduce: Literal["mean", "none"] = "mean"
    permutations: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_target(self.names[0], "label", self.permutations, names=("label",))
        check_bins(self.names[0], self.bins)
        if self.method == "binning" and self.covariance == "pooled":
            raise ValueError(f"{self.names[0]}: covariance: pooled is for method: gaussian; set it, or leave covariance out")

    def needs(self) -> dict[str, Need]:
        if self.method == "binning":
            needs = {"y": Need(Sample, "output", "samples", "label")}
        elif self.covariance == "per_class":
            needs = {"y": Need(ClassGram, "output", "samples", "label")}
        else:
            needs = {"y": Need(ByClass, "output", "samples", "label"), "every": Need(Gram, "output", "samples")}
        return with_permutations(needs, self.permutations, "label")

    def __call__(self, weight: Tensor | None, y: ClassGram | ByClass | Sample, every: Gram | None = None, **_: Any) -> Tensor:
        pairs = (self._binned(y) if isinstance(y, Sample) else self._pairs(y, every).synergy).fill_diagonal_(0)
        return mean_of_partners(pairs) if self.reduce == "mean" else pairs

    def counts(self, weight: Tensor | None, y: ClassGram | ByClass | Sample, every: Gram | None = None, **_: Any) -> dict[str, int]:
        if isinstance(y, Sample):
            return {"constant": int(constant_columns(labelled(y)[0]).sum()), "rows_left_out": int(y.seen) - len(y.rows)}
        rows = {"classes_left_out": int(((y.n > 0) & (y.n < FEWEST)).sum())} if every is None else {}
        pairs, least = self._pairs(y, every), FEWEST if every is None else 1
        return rows | {
            "constant": int(pairs.unvarying.sum()),
            "degenerate": int(torch.triu(pairs.degenerate & ~pairs.collinear, 1).sum()),
            "collinear": int(torch.triu(pairs.collinear, 1).sum()),
            "above_entropy": int(torch.triu(pairs.joint > entropy(y.n.where(y.n >= least, 0)), 1).sum()),
        }

    def _binned(self, y: Sample) -> Tensor:
        """The synergy of each pair from histograms, (units, units)."""
        rows, label = labelled(y)
        if len(rows) < 2:
            return rows.new_full((rows.shape[1],) * 2, torch.nan)
        single, pairs = class_information_of_pairs(quantile_bins(rows, self.bins), label, self.bins)
        return pairs - torch.maximum(single[:, None], single)

    def _pairs(self, y: ClassGram | ByClass, every: Gram | None) -> "_Pairs":
        if isinstance(y, ClassGram):
            y = y.only(y.n >= FEWEST)
            whole = y.gram
            parts = [(float(n / y.n.sum()), _scatter(y, c) / (n - self.ddof)) for c, n in enumerate(y.n.double())]
        else:
            assert every is not None
            check_same_rows(every.n, y.n.sum())
            whole, (within, groups) = every, _pooled(y, every)
            parts = [(1.0, within / (every.n - self.ddof * groups))]
        total = whole.covariance * (whole.n - 1) / (whole.n - self.ddof)
        return _Pairs.of(total, constant_units(whole), parts)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """The synergy of each pair, (units, units), and the pairs and units that are edge cases."""

    synergy: Tensor
    joint: Tensor  # (units, units): the information of both units
    unvarying: Tensor  # (units,) bool: constant
    collinear: Tensor  # (units, units) bool: over all rows
    degenerate: Tensor  # (units, units) bool: noise was added

    @classmethod
    def of(cls, total: Tensor, unvarying: Tensor, parts: list[Part]) -> "_Pairs":
        live = ~unvarying[:, None] & ~unvarying
        scale = total.diagonal().where(~unvarying, 1.0).sqrt()

        def standard(covariance: Tensor) -> Tensor:
            """In units of the total variance; a constant unit has variance 1 and no covariance, in every class."""
            return torch.where(live, covariance / scale.outer(scale), 0.0) + unvarying.double().diag()

        whole = standard(total)
        within = [(share, standard(covariance)) for share, covariance in parts]
        small = torch.stack([part.diagonal() < SMALLEST_VARIANCE for _, part in within]).any(0) if within else unvarying
        clean, gap, joint = _synergy(whole, within, SMALLEST_VARIANCE * small)
        close = gap < COLLINEAR
        noisy = _synergy(whole, within, torch.full_like(scale, SMALLEST_VARIANCE))[0] if bool(close.any()) else clean
        collinear = 1 - whole.square() < COLLINEAR
        synergy = torch.where(close, noisy, clean).where(~collinear, 0.0)
        unknown = not within or not bool(total.isfinite().all())
        return cls(
            torch.full_like(total, torch.nan) if unknown else synergy, joint, unvarying, collinear, close | small | small[:, None]
        )


def _synergy(total: Tensor, within: list[Part], noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Synergy, smallest 1 - rho^2 and joint information of each pair, all (units, units), with noise (units,) in the variances."""
    spread, rho2 = _parts(total, noise)
    single, more, gap = 0.5 * spread.log(), -gaussian_information(rho2), 1 - rho2
    for share, covariance in within:
        spread, rho2 = _parts(covariance, noise)
        single = single - share * 0.5 * spread.log()
        more = more + share * gaussian_information(rho2)
        gap = torch.minimum(gap, 1 - rho2)
    return torch.minimum(single[:, None], single) + more, gap.fill_diagonal_(1), single[:, None] + single + more


def _parts(covariance: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Variances with noise added, (units,), and squared correlations, (units, units)."""
    spread = covariance.diagonal().clamp_min(0) + noise
    return spread, covariance.square() / spread.outer(spread)


def _scatter(y: ClassGram, c: int) -> Tensor:
    return y.outer[c] - y.total[c].outer(y.total[c]) / y.n[c]


def _pooled(y: ByClass, every: Gram) -> tuple[Tensor, int]:
    """Sum of products about the class means, (units, units), and the number of classes with rows."""
    y = y.about(shift=every.shift).only(y.n > 0)
    return every.outer - y.total.T @ (y.total / y.n[:, None]), len(y.n)
