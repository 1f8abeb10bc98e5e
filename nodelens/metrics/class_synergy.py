"""What two units tell of the class together."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nodelens.statistics import ByClass, ClassGram, Gram
from nodelens.statistics.linalg import gaussian_information

from .base import Metric, mean_of_partners
from .classes import SILENT
from .information import silent
from .need import Need
from .paired_target import TWIN, check_target, with_permutations

FEWEST = 4  # rows of a class: fewer settle no covariance of two units
Part = tuple[float, Tensor]  # a class's share of the rows, its covariance (units, units)


@dataclass(frozen=True)
class ClassSynergy(Metric):
    """What two units tell of the class beyond the better of them: I(c; y_i, y_j) - max(I(c; y_i), I(c; y_j)), ALL pairs.

    One estimator for one unit and two: with ddof 0 the answer is never below 0. ``covariance: per_class`` gives each class
    its own and leaves out classes of fewer than four rows; ``pooled`` one to all, which wants no sums a class and pair; rows
    without a label count there as a class, ``without_label``. Where a unit is all but silent in a class, or two are all but
    twins in one (1 - rho^2 < 1e-6), noise of 1e-6 of their variance is added to total and classes alike, ``degenerate``;
    where they are twins over all rows a twin adds nothing: 0, ``twins``.

    Formula: S_ij = I_ij - max(I_i, I_j), I_A = 0.5 [ln det S_A - sum_c p_c ln det S_A,c], S_A the covariance of the units A over
             all rows, S_A,c that within class c, p_c its share of the rows; pooled: sum_c p_c S_A,c in place of each S_A,c
    Shapes: y over rows of width units, by class -> (units,) or (units, units)
    Unit:   nats, 0 and above; two classes of equal size with correlations +-0.8: 0.5108, pooled 0
    NaN:    per_class: no class has four rows; pooled: fewer than two rows, with ddof 1 no more than classes; the
            mean of a layer of one unit
    Raises: ValueError when there are no labels
    Source: Barrett 2015, Phys. Rev. E 91, 052802, 1411.2832, section IV; Cover & Thomas 2006, theorem 8.4.1
    """

    names: ClassVar = ("class_synergy",)
    kind: ClassVar = "pair"
    nan: ClassVar = "no class has four rows (pooled: too few rows), or a layer of one unit"
    covariance: Literal["per_class", "pooled"] = "per_class"
    ddof: Literal[0, 1] = 0
    reduce: Literal["mean", "none"] = "mean"
    permutations: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_target(self.names[0], "label", self.permutations, names=("label",))

    def needs(self) -> dict[str, Need]:
        if self.covariance == "per_class":
            needs = {"y": Need(ClassGram, "output", "samples", "label")}
        else:
            needs = {"y": Need(ByClass, "output", "samples", "label"), "every": Need(Gram, "output", "samples")}
        return with_permutations(needs, self.permutations, "label")

    def __call__(self, weight: Tensor | None, y: ClassGram | ByClass, every: Gram | None = None, **_: Any) -> Tensor:
        pairs = self._pairs(y, every).synergy.fill_diagonal_(0)
        return mean_of_partners(pairs) if self.reduce == "mean" else pairs

    def counts(self, weight: Tensor | None, y: ClassGram | ByClass, every: Gram | None = None, **_: Any) -> dict[str, int]:
        few = int(((y.n > 0) & (y.n < FEWEST)).sum())
        rows = {"classes_left_out": few} if every is None else {"without_label": int(every.n - y.n.sum())}
        pairs = self._pairs(y, every)
        return rows | {
            "constant": int(pairs.still.sum()),
            "degenerate": int(torch.triu(pairs.degenerate & ~pairs.twins, 1).sum()),
            "twins": int(torch.triu(pairs.twins, 1).sum()),
        }

    def _pairs(self, y: ClassGram | ByClass, every: Gram | None) -> "_Pairs":
        if isinstance(y, ClassGram):
            y = y.only(y.n >= FEWEST)
            whole = y.gram
            parts = [(float(n / y.n.sum()), _scatter(y, c) / (n - self.ddof)) for c, n in enumerate(y.n.double())]
        else:
            assert every is not None
            whole, (within, groups) = every, _pooled(y, every)
            parts = [(1.0, within / (every.n - self.ddof * groups))]
        total = whole.covariance * (whole.n - 1) / (whole.n - self.ddof)
        return _Pairs.of(total, silent(whole), parts)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """What the covariances give for each pair, (units, units), and where a rule was used."""

    synergy: Tensor
    still: Tensor  # (units,) bool: does not vary
    twins: Tensor  # bool: over all rows
    degenerate: Tensor  # bool: noise was added

    @classmethod
    def of(cls, total: Tensor, still: Tensor, parts: list[Part]) -> "_Pairs":
        live = ~still[:, None] & ~still
        scale = total.diagonal().where(~still, 1.0).sqrt()

        def standard(covariance: Tensor) -> Tensor:
            """In units of the total variance; a unit that does not vary is one of its own, the same in all classes."""
            return torch.where(live, covariance / scale.outer(scale), 0.0) + still.double().diag()

        whole = standard(total)
        within = [(share, standard(covariance)) for share, covariance in parts]
        mute = torch.stack([part.diagonal() < SILENT for _, part in within]).any(0) if within else still
        clean, gap = _synergy(whole, within, SILENT * mute)
        close = gap < TWIN
        noisy = _synergy(whole, within, torch.full_like(scale, SILENT))[0] if bool(close.any()) else clean
        twins = 1 - whole.square() < TWIN
        synergy = torch.where(close, noisy, clean).where(~twins, 0.0)
        unknown = not within or not bool(total.isfinite().all())
        return cls(torch.full_like(total, torch.nan) if unknown else synergy, still, twins, close | mute | mute[:, None])


def _synergy(total: Tensor, within: list[Part], noise: Tensor) -> tuple[Tensor, Tensor]:
    """Synergy of each pair, and the least 1 - rho^2 that its covariances have, both (units, units); noise (units,) is added."""
    spread, rho2 = _parts(total, noise)
    single, more, gap = 0.5 * spread.log(), -gaussian_information(rho2), 1 - rho2
    for share, covariance in within:
        spread, rho2 = _parts(covariance, noise)
        single = single - share * 0.5 * spread.log()
        more = more + share * gaussian_information(rho2)
        gap = torch.minimum(gap, 1 - rho2)
    return torch.minimum(single[:, None], single) + more, gap.fill_diagonal_(1)


def _parts(covariance: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Variances with noise, (units,), and squared correlations, (units, units)."""
    spread = covariance.diagonal().clamp_min(0) + noise
    return spread, covariance.square() / spread.outer(spread)


def _scatter(y: ClassGram, c: int) -> Tensor:
    return y.outer[c] - y.total[c].outer(y.total[c]) / y.n[c]


def _pooled(y: ByClass, every: Gram) -> tuple[Tensor, int]:
    """Sum of products about the classes' means, (units, units), and how many classes: rows without a label are one more."""
    y = y.about(shift=every.shift)
    n = torch.cat([y.n, every.n - y.n.sum()])
    total = torch.cat([y.total, (every.total - y.total.sum(0))[None]])[n > 0]
    return every.outer - total.T @ (total / n[n > 0, None]), len(total)


METRICS: tuple[type[Metric], ...] = (ClassSynergy,)
