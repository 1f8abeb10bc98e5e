"""Information that a unit carries about the class."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nodelens.statistics import ByClass, Sample
from nodelens.statistics.base import derived
from nodelens.statistics.linalg import constant

from .base import Metric
from .binning import binned_information, check_bins, constant_columns
from .need import Need
from .paired_target import check_target, with_permutations

SMALLEST_VARIANCE = 1e-6  # of the total variance: a smaller variance within a class has no usable logarithm


@dataclass(frozen=True)
class ClassInformation(Metric):
    """Mutual information of a unit's activation and the class. Use it to find units that discriminate between classes.

    ``method: binning`` uses a histogram with ``bins`` of equal width over at most 2,048 samples; their choice depends on the
    content of the samples only (``rows_left_out``). It never exceeds H(class), the entropy of the class, and ranks units behind a
    ReLU as the nearest-neighbour estimate of Ross (2014) does: on ten layers of two trained networks (ResNet-20, LeNet-5) the
    rank correlation is 0.92 to 0.98. That of ``pooled`` is 0.76 to 1.00, that of ``gaussian`` 0.43 to 0.94, and ``gaussian``
    exceeds H(class) in up to 3 % of the units of a layer. ``gaussian`` treats the activation as Gaussian within classes and
    overall, so it overestimates well separated classes (means at -+3, sd 1: 1.151, true value 0.689). ``pooled`` uses one
    variance for all classes, -0.5 ln(1 - eta^2), with ddof 0. Both hold sums instead of samples, which takes less memory, leave
    out classes with one row, and count in ``above_entropy`` the units whose value exceeds H(class). Values are not clipped: with
    ddof 1 an uninformative unit may be below 0. If a unit is almost constant within a class (Var_c < 1e-6 Var), 1e-6 Var is added
    to the total and to every class (``degenerate``). ``bias: gaussian`` subtracts the expected value of an uninformative unit.

    Formula: binning: sum_bc p_bc ln(p_bc / (p_b p_c)), p_bc the share of rows in bin b and class c;
             gaussian: 0.5 ln Var - sum_c p_c 0.5 ln Var_c, Var_c the variance within class c, p_c its share of the rows, Var that
             of all rows; bias: c(n) - sum_c p_c c(n_c), c(m) = [psi((m-1)/2) - ln((m-ddof)/2)]/2, n_c rows of class c, psi digamma;
             pooled: [psi((n-1)/2) - psi((n-K)/2)]/2, K classes
    Shapes: y over rows of width units, by class -> (units,)
    Unit:   nats. binning: in [0, H(class)], at most ln K; independent of the class about (K - 1)(bins - 1)/(2n), n at most 2,048.
            gaussian, pooled: at most 6.9; N(-1, 1) against N(1, 1): 0.3466; independent of the class about (K - 1)/(2n)
    NaN:    fewer than two rows in every class; binning: fewer than two rows
    Raises: ValueError when there are no labels, for a bias correction with binning, and for fewer than two bins
    Source: definition, Cover & Thomas 2006, ch. 8; pooled: eta^2, Pearson's correlation ratio; compared with Ross 2014, PLoS ONE
            9:e87357
    """

    names: ClassVar = ("class_mutual_information", "class_mi")
    coverage: ClassVar = "of method: gaussian; intervals do not contain the bias of binning, (K - 1)(bins - 1)/(2n)"
    nan: ClassVar = "no class has two rows"
    method: Literal["binning", "gaussian", "pooled"] = "binning"
    ddof: Literal[0, 1] = 1
    bins: int = 10
    bias: Literal["none", "gaussian"] = "none"
    permutations: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bins(self.names[0], self.bins)
        check_target(self.names[0], "label", self.permutations, names=("label",))
        if self.method == "binning" and self.bias != "none":
            raise ValueError(f"{self.names[0]}: bias: gaussian is for method: gaussian and pooled; set one, or bias: none")

    def needs(self) -> dict[str, Need]:
        statistic = Sample if self.method == "binning" else ByClass
        return with_permutations({"y": Need(statistic, "output", "samples", "label")}, self.permutations, "label")

    def __call__(self, weight: Tensor | None, y: ByClass | Sample, **_: Any) -> Tensor:
        if isinstance(y, Sample):
            return _binned(y, self.bins)
        total, within, share = self._variances(y)
        small = (within < SMALLEST_VARIANCE * total).any(0)
        total, within = total + SMALLEST_VARIANCE * total * small, within + SMALLEST_VARIANCE * total * small
        if self.method == "pooled":
            within, share = (share @ within)[None], share.sum()[None]
        value = 0.5 * (total.log() - share @ within.log())
        if self.bias == "gaussian":
            value = value - self._bias(y)
        value = value.where(~constant(total, self._seen(y).moments.mean), 0.0)
        return value if bool((y.n > 1).any()) else torch.full_like(value, torch.nan)

    def counts(self, weight: Tensor | None, y: ByClass | Sample, **_: Any) -> dict[str, int]:
        if isinstance(y, Sample):
            return {"constant": int(constant_columns(labelled(y)[0]).sum()), "rows_left_out": int(y.seen) - len(y.rows)}
        total, within, _share = self._variances(y)
        small = (within < SMALLEST_VARIANCE * total).any(0)
        unvarying = constant(total, self._seen(y).moments.mean)
        return {
            "constant": int(unvarying.sum()),
            "degenerate": int((small & ~unvarying).sum()),
            "classes_left_out": int((y.n == 1).sum()),
            "above_entropy": int((self(weight, y) > entropy(self._seen(y).n)).sum()),
        }

    def _seen(self, y: ByClass) -> ByClass:
        return y.only(y.n > 1)

    def _variances(self, y: ByClass) -> tuple[Tensor, Tensor, Tensor]:
        """Variances over all rows (units,) and within classes (K, units), and the shares of the classes (K,)."""
        y, ddof = self._seen(y), 0 if self.method == "pooled" else self.ddof
        every = y.moments
        total = every.variance * (every.n.double() - 1) / (every.n.double() - ddof)
        return total, y.variance(ddof), y.n / y.n.sum().double()

    def _bias(self, y: ByClass) -> Tensor:
        """The expected estimate for a unit whose distribution is the same in all classes, ()."""
        n = self._seen(y).n.double()
        if self.method == "pooled":
            return 0.5 * (torch.special.digamma((n.sum() - 1) / 2) - torch.special.digamma((n.sum() - len(n)) / 2))
        each, whole = (torch.special.digamma((m - 1) / 2) - ((m - self.ddof) / 2).log() for m in (n, n.sum()))
        return 0.5 * (whole - n / n.sum() @ each)


def entropy(n: Tensor) -> Tensor:
    """H(class) in nats, (), of classes with n rows, (K,)."""
    return torch.special.entr(n / n.sum().double()).sum()


@derived
def _binned(y: Sample, bins: int) -> Tensor:
    """Information of each unit about the class, (units,), from a histogram; also a part of composite_importance."""
    rows, label = labelled(y)
    if len(rows) < 2:
        return rows.new_full(rows.shape[1:], torch.nan)
    return binned_information(rows, label, bins, int(label.max()) + 1)


@derived
def labelled(y: Sample) -> tuple[Tensor, Tensor]:
    """Rows that have a class, (n, units), and their classes, (n,) int64."""
    label = y.target[:, 0].round().long()
    return y.rows[label >= 0], label[label >= 0]
