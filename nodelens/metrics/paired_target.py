"""Shared by metrics of a target: which targets they accept, correlations with units, and the permutation test."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nodelens.network.targets import NAMES
from nodelens.statistics import Cross, Moments, Sample
from nodelens.statistics.base import Statistic, derived
from nodelens.statistics.linalg import constant, correlation

from .covariances import constant_units
from .need import Need, Target

TARGETS = tuple(name for name in NAMES if name != "label")
COLLINEAR = 1e-6  # 1 - rho^2 below which two variables count as collinear


def check_target(
    metric: str, target: Target, permutations: int = 0, names: Sequence[str] = TARGETS, functions: bool = True
) -> None:
    """Raises ValueError for a target that is not a name, names joined by + or a function, and for invalid permutations."""
    if isinstance(permutations, bool) or not isinstance(permutations, int) or permutations < 0:
        raise ValueError(
            f"{metric}: permutations is {permutations!r}; it must be a number of permutations of the target, 0 or more"
        )
    if functions and (callable(target) or (isinstance(target, str) and "." in target)):
        return
    parts = target.split("+") if isinstance(target, str) else [target]
    for part in parts:
        if part not in names:
            own = ", or a function of (logits, labels)" if functions else ""
            raise ValueError(f"{metric}: target is {part!r}; it takes {', '.join(names)}, several joined by +{own}")
    if len(parts) > 1 and "logit_pc1" in parts:
        raise ValueError(f"{metric}: logit_pc1 is made of the logits of all samples; it cannot be joined to other targets by +")


def stored_target(target: Target) -> Target:
    """The target to pair with the rows in a pass: the first axis of the logits is known only after it, so all logits are kept."""
    return "logits" if target == "logit_pc1" else target


def with_permutations(needs: dict[str, Need], permutations: int, target: Target) -> dict[str, Need]:
    """The needs and, for a permutation test, the samples over which the target is permuted."""
    return needs | {"permutations": Need(Sample, "output", "samples", target)} if permutations else needs


def target_needs(units: type[Statistic], target: Target, permutations: int) -> dict[str, Need]:
    """Sums of the units and with a target over samples, and what a permutation test needs."""
    needs = {"y": Need(units, "output", "samples"), "z": Need(Cross, "output", "samples", target)}
    return with_permutations(needs, permutations, target)


def target_rows(z: Cross, target: Target) -> Cross:
    """The sums with the target, from the sums with what was paired with the rows."""
    if target != "logit_pc1" or not z.target_covariance.isfinite().all():
        return z
    return z.project(torch.linalg.eigh(z.target_covariance).eigenvectors[:, -1:])


@derived
def constant_targets(z: Cross) -> Tensor:
    """Which targets are constant, (t,) bool."""
    return constant(z.target_covariance.diagonal(), z.target_mean)


def check_same_rows(units: Tensor, paired: Tensor) -> None:
    """Raises ValueError if the sums of the units and those with the target count different rows, (1,) each."""
    if int(units) != int(paired):
        raise ValueError(
            f"the sums of the units cover {int(units)} rows, those with the target {int(paired)}: compute both from the rows "
            "that have a target"
        )


@derived
def with_targets(y: Moments, z: Cross) -> Tensor:
    """Correlations of units with targets, (units, t): 0 where either is constant, NaN below two rows.

    Raises ValueError as ``check_same_rows`` does.
    """
    check_same_rows(y.n, z.n)
    live = ~constant_units(y)[:, None] & ~constant_targets(z)
    spread = z.target_covariance.diagonal().where(~constant_targets(z), 1.0).sqrt()
    scale = y.variance[:, None].where(live, 1.0).sqrt() * spread
    r = torch.where(live, z.covariance / scale, 0.0)
    return r.where((y.n > 1) & (z.n > 1), torch.nan)


@derived
def whitening(z: Cross) -> Tensor:
    """A whitening matrix of the standardized targets, (t, axes): constant and collinear targets add no axis."""
    among = correlation(z.target_covariance, constant_targets(z))
    if int(z.n) < 2:
        return torch.eye(len(among), dtype=among.dtype, device=among.device)
    values, axes = torch.linalg.eigh(among)
    held = values > COLLINEAR
    return axes[:, held] / values[held].sqrt()
