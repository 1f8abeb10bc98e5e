"""What metrics of a target share: which targets they take, how units go with them, and the permutation test."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nodelens.network.targets import NAMES
from nodelens.statistics import Cross, Moments, Sample
from nodelens.statistics.linalg import constant, correlation

from .need import Need, Target

TARGETS = tuple(name for name in NAMES if name != "label")
TWIN = 1e-6  # of 1 - rho^2: below, a partner adds nothing


def check_target(
    metric: str, target: Target, permutations: int = 0, names: Sequence[str] = TARGETS, functions: bool = True
) -> None:
    """Raises ValueError for a target that is no name, names joined by + or function, and for permutations below 0."""
    if isinstance(permutations, bool) or not isinstance(permutations, int) or permutations < 0:
        raise ValueError(
            f"{metric}: permutations is {permutations!r}; it is the number of permuted copies of the target, 0 or more"
        )
    if functions and (callable(target) or (isinstance(target, str) and "." in target)):
        return
    parts = target.split("+") if isinstance(target, str) else [target]
    for part in parts:
        if part not in names:
            own = ", or a function of (logits, labels)" if functions else ""
            raise ValueError(f"{metric}: target is {part!r}; it takes {', '.join(names)}, several joined by +{own}")
    if len(parts) > 1 and "logit_pc1" in parts:
        raise ValueError(f"{metric}: logit_pc1 is made of the logits of all samples; it is a target alone, not joined by +")


def beside_rows(target: Target) -> Target:
    """What has to stand beside the rows for a target: an axis of the logits is known once all logits are."""
    return "logits" if target == "logit_pc1" else target


def with_permutations(needs: dict[str, Need], permutations: int, target: Target) -> dict[str, Need]:
    """The needs, and with a permutation test the samples over which it permutes the target over."""
    return needs | {"permutations": Need(Sample, "output", "samples", target)} if permutations else needs


def target_rows(z: Cross, target: Target) -> Cross:
    """The sums with a target, of those with what stood beside the rows."""
    if target != "logit_pc1" or not z.target_covariance.isfinite().all():
        return z
    return z.project(torch.linalg.eigh(z.target_covariance).eigenvectors[:, -1:])


def idle(z: Cross) -> Tensor:
    """Targets that do not vary, (t,) bool."""
    return constant(z.target_covariance.diagonal(), z.target_mean)


def with_targets(y: Moments, z: Cross) -> Tensor:
    """Correlations of units with targets, (units, t): 0 where one does not vary, NaN below two rows."""
    live = ~constant(y.variance, y.mean)[:, None] & ~idle(z)
    spread = z.target_covariance.diagonal().where(~idle(z), 1.0).sqrt()
    scale = y.variance[:, None].where(live, 1.0).sqrt() * spread
    r = torch.where(live, z.covariance / scale, 0.0)
    return r.where((y.n > 1) & (z.n > 1), torch.nan)


def whitening(z: Cross) -> Tensor:
    """PruningGroups of the standardized targets that are uncorrelated with unit variance, in columns, (t, axes).

    Targets that do not vary have none, and targets that follow from others none of their own.
    """
    among = correlation(z.target_covariance, idle(z))
    if int(z.n) < 2:
        return torch.eye(len(among), dtype=among.dtype, device=among.device)
    values, axes = torch.linalg.eigh(among)
    held = values > TWIN
    return axes[:, held] / values[held].sqrt()
