"""Information that a unit carries about a target beyond the class, or beyond another target."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nodelens.statistics import ClassCross, Cross, Moments
from nodelens.statistics.linalg import constant, correlation, gaussian_information, joint_bias

from .base import Metric
from .covariances import constant_units
from .need import Need
from .paired_target import COLLINEAR, TARGETS, check_target, constant_targets, whitening, with_permutations, with_targets

FEWEST = 4  # rows of a class, below which a correlation is left to chance
COLUMNS = tuple(name for name in TARGETS if name != "logit_pc1")  # that can be combined with another target
SINGLE = tuple(name for name in COLUMNS if name != "logits")


@dataclass(frozen=True)
class ConditionalInformation(Metric):
    """Gaussian mutual information of a unit and a target given the class, which leaves out what the class explains.

    Classes with fewer than four rows are left out (``classes_left_out``). A unit or target that is constant within a class
    contributes 0 there. For several target columns, the value is the mean over columns. Independence within K classes gives about
    K/(2n), which ``bias: gaussian`` subtracts. Targets are those of mutual_information_gaussian except logit_pc1 and functions.

    Formula: sum_c p_c -0.5 ln(1 - rho_c^2), rho_c = corr(y, z | class c) with target z, p_c the share of the class;
             bias: sum_c p_c [psi((n_c-1)/2) - psi((n_c-2)/2)]/2, n_c rows of class c, psi digamma
    Shapes: y over rows of width units, paired with class and target -> (units,)
    Unit:   nats, in [0, 6.908]; corr 0.6 in every class: 0.2231
    NaN:    no class has four rows
    Raises: ValueError for an unknown target, and for missing labels or logits
    Source: Cover & Thomas 2006, Elements of Information Theory, sections 2.5 and 8.5
    """

    names: ClassVar = ("mi_given_class",)
    target: str = "auto"
    bias: Literal["none", "gaussian"] = "none"
    permutations: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_target(self.names[0], self.target, self.permutations, names=COLUMNS, functions=False)

    def needs(self) -> dict[str, Need]:
        target = f"label+{self.target}"
        return with_permutations({"y": Need(ClassCross, "output", "samples", target)}, self.permutations, target)

    def __call__(self, weight: Tensor | None, y: ClassCross, **_: Any) -> Tensor:
        y = y.only(y.n >= FEWEST)
        spread, other = y.variance(), y.target_variance()
        other_mean = y.target_shift + y.target_total / y.n[:, None]
        live = ~constant(spread, y.by_class.mean)[:, :, None] & ~constant(other, other_mean)[:, None]
        scale = spread[:, :, None].where(live, 1.0).sqrt() * other[:, None].where(live, 1.0).sqrt()
        value = gaussian_information(torch.where(live, y.covariance() / scale, 0.0).square())
        if self.bias == "gaussian":
            value = value - joint_bias(y.n, 1, 1)[:, None, None] * live
        value = (y.n.double()[:, None] * value.mean(2)).sum(0) / y.n.sum()
        return value if len(y.n) else torch.full_like(value, torch.nan)

    def counts(self, weight: Tensor | None, y: ClassCross, **_: Any) -> dict[str, int]:
        kept = y.only(y.n >= FEWEST).by_class
        return {
            "constant": int(constant(kept.variance(), kept.mean).all(0).sum()) if len(kept.n) else 0,
            "classes_left_out": int(((y.n > 0) & (y.n < FEWEST)).sum()),
        }


@dataclass(frozen=True)
class ConditionalMutualInformation(Metric):
    """Gaussian mutual information of a unit and a target given another target, the condition.

    Target and condition are target names of mutual_information_gaussian except logit_pc1; the condition may have several columns,
    the target has one. Where the condition determines the target or the unit, the value is 0 (``determined``). Conditionally
    independent variables give about 1/(2n), which ``bias: gaussian`` subtracts.

    Formula: -0.5 ln(1 - rho^2), rho = (r_yz - r_yt'R_t^-1 r_tz) / sqrt((1 - r_yt'R_t^-1 r_ty)(1 - r_zt'R_t^-1 r_tz)), the partial
             correlation of unit y and target z given condition t; r correlations, R_t those among the columns of t
    Shapes: y over rows of width units, paired with target and condition -> (units,)
    Unit:   nats, in [0, 6.908]; with a condition independent of both, equal to mutual_information_gaussian
    NaN:    fewer than two rows; with a bias correction, at most two more rows than condition columns
    Raises: ValueError for an unknown target or condition, and when labels or logits are missing or the columns do not fit
    Source: Cover & Thomas 2006, Elements of Information Theory, section 2.5; Ince et al. 2017, doi 10.1002/hbm.23471, eq. 11
    """

    names: ClassVar = ("mi_given_target",)
    nan: ClassVar = "fewer than two rows, or with a bias correction at most two more than condition columns"
    target: str = "auto"
    condition: str = "correct_logit"
    bias: Literal["none", "gaussian"] = "none"
    permutations: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target not in SINGLE:
            raise ValueError(f"{self.names[0]}: target is {self.target!r}; it takes {', '.join(SINGLE)}")
        check_target(self.names[0], self.target, self.permutations)
        check_target(f"{self.names[0]}, condition", self.condition, names=COLUMNS, functions=False)

    def needs(self) -> dict[str, Need]:
        both = f"{self.target}+{self.condition}"
        needs = {"y": Need(Moments, "output", "samples"), "z": Need(Cross, "output", "samples", both)}
        return with_permutations(needs, self.permutations, both)

    def __call__(self, weight: Tensor | None, y: Moments, z: Cross, **_: Any) -> Tensor:
        r, own, among, size = self._parts(y, z)
        left = (1 - among.square().sum(1)) * (1 - own.square().sum())
        rho = (r - among @ own) / left.clamp_min(COLLINEAR**2).sqrt()
        value = gaussian_information(rho.square()).where(~self._determined(among, own) | ~rho.isfinite(), 0.0)
        if self.bias == "gaussian":
            informative = ~constant_units(y) & ~constant_targets(z)[0] & ~self._determined(among, own)
            value = value - joint_bias(z.n - size, 1, 1) * informative
        return value

    def counts(self, weight: Tensor | None, y: Moments, z: Cross, **_: Any) -> dict[str, int]:
        _r, own, among, _size = self._parts(y, z)
        return {
            "constant": int(constant_units(y).sum()),
            "determined": int(self._determined(among, own).sum()),
        }

    def _parts(self, y: Moments, z: Cross) -> tuple[Tensor, Tensor, Tensor, int]:
        """Correlations of units with target (units,), target with condition axes (axes,), units with these axes (units, axes)."""
        columns = z.cross.shape[1]
        if columns < 2 or (columns > 2 and self.condition in SINGLE and self.condition != "given"):
            raise ValueError(
                f"{self.names[0]}: got {columns} target columns; the first is the target, the others are the condition"
            )
        axes = whitening(z.project(torch.eye(columns).to(z.cross)[:, 1:]))
        among = correlation(z.target_covariance, constant_targets(z))
        r = with_targets(y, z)
        return r[:, 0], among[0, 1:] @ axes, r[:, 1:] @ axes, axes.shape[1]

    def _determined(self, among: Tensor, own: Tensor) -> Tensor:
        return (1 - among.square().sum(1) < COLLINEAR) | (1 - own.square().sum() < COLLINEAR)
