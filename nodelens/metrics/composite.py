"""Several metrics combined into one score: a weighted sum, each metric scaled within its layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .base import Metric
from .need import Need
from .registry import get_metric, names_of


@dataclass(frozen=True)
class CompositeImportance(Metric):
    """Weighted sum of other metrics, each first scaled over the units of its layer.

    ``log`` lists the parts that enter as logarithms. ``metrics`` sets options of the parts, as in {rayleigh_quotient: {relative:
    false}}. Scaled values rank the units of ONE layer and cannot be compared between layers. With ``minmax``, one extreme unit sets
    the scale of all. A part that fails raises an error. The standard error is a jackknife of the whole sum.

    Formula: sum_k w_k norm(s_k), s_k the parts (ln s_k for parts in log), w_k their weights; norm minmax: (s - min)/(max - min),
             0.5 where all are equal; rank: (mean rank - 1)/(N - 1), N units; robust_z: (s - median)/(1.4826 MAD), MAD the
             median of |s - median|; where MAD = 0, a unit at the median has 0; none: s
    Shapes: parts of shape (units,) each -> (units,)
    Unit:   none; between the sums of the negative and of the positive weights with minmax and rank
    NaN:    a part is NaN, or its logarithm undefined (values <= 0); robust_z: a unit off the median where MAD = 0
    Raises: ValueError for a part that is unknown, does not give one value per unit, or reads a parameter other than the weight
    Source: definition
    """

    names: ClassVar = ("composite_importance", "composite")
    nan: ClassVar = "a part is NaN or has no logarithm (values <= 0), or its spread is 0 (robust_z)"
    weights: Mapping[str, float] = field(
        default_factory=lambda: {"rayleigh_quotient": 1.0, "class_mutual_information": 0.5, "redundancy": -0.3},
        hash=False,
    )
    log: Sequence[str] = ("rayleigh_quotient",)
    normalize: Literal["minmax", "rank", "robust_z", "none"] = "minmax"
    metrics: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = {"weights": dict(self.weights), "log": tuple(self.log), "metrics": {k: dict(v) for k, v in self.metrics.items()}}
        for name, value in plain.items():  # equal whether the options came as lists from YAML or as tuples from code
            object.__setattr__(self, name, value)
        _check(self)

    @cached_property
    def parts(self) -> dict[str, Metric]:
        """The metrics of the sum, by name. Raises ValueError for one that cannot be a part."""
        parts = {name: _lookup(name, self.metrics.get(name, {})) for name in self.weights}
        for name, part in parts.items():
            if part.shape != "unit":
                raise ValueError(
                    f"{self.names[0]} adds values per unit; {name} gives one value per {_SHAPES.get(part.shape, part.shape)}"
                )
            if part.weighted and part.parameter != "weight":
                raise ValueError(f"{self.names[0]} reads the layer's weight; {name} reads another parameter, {part.parameter}")
            if part.grouped:
                raise ValueError(f"{self.names[0]} reads sums over all samples; {name} reads sums per group of samples")
        return parts

    @cached_property
    def logs(self) -> set[str]:
        """The parts that enter as logarithms; ``log`` may use any name of a metric."""
        aliases = {other for name in self.log if _lookup(name, {}) for other in names_of(name)}
        return aliases & set(self.weights)

    @property
    def weighted(self) -> bool:
        """Whether a part reads the weight."""
        return any(part.weighted for part in self.parts.values())

    def needs(self) -> dict[str, Need]:
        return {f"{name}.{key}": need for name, part in self.parts.items() for key, need in part.needs().items()}

    def __call__(self, weight: Tensor | None, **statistics: Any) -> Tensor:
        scaled = {name: _SCALES[self.normalize](s) for name, s in self._scores(weight, statistics).items()}
        return torch.stack([self.weights[name] * s for name, s in scaled.items()]).sum(0)

    def counts(self, weight: Tensor | None, **statistics: Any) -> dict[str, int]:
        of_parts = {name: part.counts(weight, **_of(name, statistics)) for name, part in self.parts.items()}
        return {f"{name}.{rule}": count for name, counts in of_parts.items() for rule, count in counts.items()}

    def _scores(self, weight: Tensor | None, statistics: Mapping[str, Any]) -> dict[str, Tensor]:
        scores = {name: part(weight, **_of(name, statistics)).double() for name, part in self.parts.items()}
        return {name: s.where(s > 0, torch.nan).log() if name in self.logs else s for name, s in scores.items()}


_SHAPES = {"pair": "pair of units (reduce: none)", "edge": "pair of layers", "input": "input feature"}


def _check(metric: CompositeImportance) -> None:
    """Raises ValueError for options that contradict each other or the catalogue: before a pass, not after it."""
    if not metric.weights:
        raise ValueError(f"{metric.names[0]}: weights is empty; set them, as in {{rayleigh_quotient: 1.0}}")
    for name, weight in metric.weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise ValueError(f"{metric.names[0]}: weights.{name} is {weight!r}; it must be a number")
    for name in metric.metrics:
        if name not in metric.weights:
            raise ValueError(f"{metric.names[0]}: metrics has options for {name!r}, but the parts are {', '.join(metric.weights)}")
    metric.parts, metric.logs  # noqa: B018 - computed for the errors they raise


def _lookup(name: str, options: Mapping[str, Any]) -> Metric:
    try:
        return get_metric(name, **options)
    except ValueError as error:
        raise ValueError(f"{CompositeImportance.names[0]}: {error}") from None


def _of(part: str, statistics: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(f"{part}."): s for name, s in statistics.items() if name.startswith(f"{part}.")}


def _minmax(s: Tensor) -> Tensor:
    low, high = _range(s)
    return (s - low) / (high - low) if high > low else _all(s, 0.5)


def _rank(s: Tensor) -> Tensor:
    """Ranks, averaged over ties. Units without a value have no rank and are not counted."""
    low, high = _range(s)
    if high <= low:
        return _all(s, 0.5)
    ordered = s[s.isfinite()].sort().values
    mean = (torch.searchsorted(ordered, s) + torch.searchsorted(ordered, s, right=True) - 1) / 2  # from 0
    return (mean.double() / (len(ordered) - 1)).where(s.isfinite(), torch.nan)


def _robust_z(s: Tensor) -> Tensor:
    low, high = _range(s)
    if high <= low:
        return _all(s, 0.0)
    away = s - s.nanquantile(0.5)
    spread = 1.4826 * away.abs().nanquantile(0.5)
    return away / spread if spread > 0 else away.where(away == 0, torch.nan)


def _range(s: Tensor) -> tuple[float, float]:
    """The smallest and largest value, or the smallest twice where they differ by rounding only."""
    known = s[s.isfinite()]
    if not len(known):
        return 0.0, 0.0
    low, high = float(known.min()), float(known.max())
    return (low, high) if high - low > _ROUNDING * max(abs(low), abs(high)) else (low, low)


def _all(s: Tensor, value: float) -> Tensor:
    return torch.full_like(s, value).where(s.isfinite(), torch.nan)


_ROUNDING = 1e-9
_SCALES: dict[str, Callable[[Tensor], Tensor]] = {"minmax": _minmax, "rank": _rank, "robust_z": _robust_z, "none": lambda s: s}
