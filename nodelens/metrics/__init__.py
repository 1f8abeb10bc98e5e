"""The catalogue: every metric, by its long name and its short ones."""

import difflib
from typing import Any

from .activation import ActivationMean, ActivationNorm, ActivationVariance, ActivationZeroFraction
from .alignment import RayleighQuotient
from .base import Metric, Need
from .classes import ClassInformation
from .gradient import Taylor
from .information import PairwiseRedundancy, Synergy
from .spectrum import EffectiveRank, ParticipationRatio
from .weight import WeightMagnitude

METRICS: tuple[type[Metric], ...] = (
    ActivationMean,
    ActivationVariance,
    ActivationNorm,
    ActivationZeroFraction,
    RayleighQuotient,
    PairwiseRedundancy,
    Synergy,
    ClassInformation,
    Taylor,
    EffectiveRank,
    ParticipationRatio,
    WeightMagnitude,
)
_BY_NAME = {name: metric for metric in METRICS for name in metric.names}


def list_metrics() -> list[str]:
    """Every name that ``get_metric`` takes, long and short."""
    return sorted(_BY_NAME)


def get_metric(name: str, **options: Any) -> Metric:
    """The metric of a name, with options.

    >>> get_metric("rq", relative=False).options
    {'relative': False, 'regularization': 0.0}

    Raises ValueError for an unknown name or option, with the nearest one.
    """
    if name not in _BY_NAME:
        raise ValueError(f"no metric is called {name!r}{_nearest(name, _BY_NAME)}; nl.list_metrics() has them all")
    metric = _BY_NAME[name]
    known = [f for f in metric.__dataclass_fields__ if f not in ("names", "kind", "weighted", "nan")]
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}{_nearest(option, known)}; it takes {', '.join(known) or 'none'}")
    return metric(**options)


def _nearest(word: str, words: Any) -> str:
    near = difflib.get_close_matches(word, list(words), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


__all__ = ["METRICS", "Metric", "Need", "get_metric", "list_metrics", *(m.__name__ for m in METRICS)]
