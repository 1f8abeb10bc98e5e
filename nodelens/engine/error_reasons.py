"""Why a standard error or a jackknife's bias is missing."""

from torch import Tensor

from nodelens.metrics import Metric

from .layout import GROUPED_WIDTH, Place
from .plan import Plan

FEWEST_SAMPLES = 4  # a jackknife of fewer samples is no estimate of an error


def no_error(metric: Metric, counts: dict[str, int], samples: Tensor) -> str:
    """Why the jackknife is not the error of a value, given its ``counts`` and the samples of each group; "" where it is."""
    if metric.no_error:
        return metric.no_error
    if counts.get("largest_value"):
        return "with so few rows the quantile is about the largest value, which the jackknife has no error of"
    few = int(samples.sum()) < FEWEST_SAMPLES
    return f"fewer than {FEWEST_SAMPLES} samples" if few else ""


def why_missing(metric: Metric, plan: Plan, place: Place, error: Tensor, value: Tensor, reason: str) -> str:
    """Why a standard error or bias is NaN where the plan is the cause, or else that a value is undefined, for a ``reason``."""
    resolved = [each for part in plan.parts(metric, place[0]) for each in plan.resolve(metric, (part, place[1])).values()]
    if any(need.port == "model" for _, need in resolved):
        return "sums over the whole model are kept once, not once per group of samples"
    if any(plan.groups_of(owner, need) == 1 for owner, need in resolved) and plan.groups > 1:
        return f"pair sums wider than {GROUPED_WIDTH} are kept once, not once per group of samples"
    if bool((error.isnan() & ~value.isnan()).any()) and plan.groups < 2:
        return "fewer than two groups of samples"
    return f"the value, or one of those with a group of samples left out, is undefined: {reason}"
