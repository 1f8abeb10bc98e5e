"""The base class of all metrics: a pure function of statistics and weights that declares which it needs."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from torch import Tensor

from nodelens.messages import shown
from nodelens.network.group_layer import GroupLayer

from .from_tensors import compute
from .need import Need

_PLAIN: Mapping[Any, tuple[type, str]] = {bool: (bool, "True or False"), int: (Integral, "an integer"), float: (Real, "a number")}
_SECTIONS = ("Formula", "Shapes", "Unit", "NaN", "Raises", "Source")


@dataclass(frozen=True)
class Metric:
    """Maps statistics and weights to one value per unit, per pair of units or per layer.

    Options are dataclass fields: the configuration sets them and the table's metadata records them. Subclasses define
    ``names`` (the full name first), ``kind`` and, in their docstring, formula, source and when the value is undefined.
    """

    names: ClassVar[tuple[str, ...]] = ()
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # further names, each with its own options
    kind: ClassVar[str] = "unit"  # unit | pair | layer | edge (two layers) | input (one value per input feature)
    weighted: ClassVar[bool] = False  # whether it reads a parameter of the layer
    # weight: (units, fan_in), for a pruning group of all producers, concatenated | tensor: the weight as stored | change: W - W0
    # norm: gammas of the norms after the layer, (units, norms) | group: the pruning group, a GroupLayer | units: a need.Units
    parameter: ClassVar[str] = "weight"
    reads_consumers: ClassVar[bool] = False  # whether it reads the consumers of the units
    whole_experts: ClassVar[bool] = False  # whether it can score whole experts of a mixture
    grouped: ClassVar[bool] = False  # whether it takes a list of one statistic per group of samples
    matrix_errors: ClassVar[bool] = False  # whether a matrix of pairs comes with a matrix of standard errors
    nan: ClassVar[str] = "never"  # the reason of missing values; by default the section NaN of the docstring
    limits: ClassVar[Mapping[str, tuple[Callable[[Any], bool], str]]] = {}  # {option: (what it has to meet, in words)}
    lacks: ClassVar[Mapping[str, str]] = {}  # options of related metrics, each with the reason why this one has none
    no_error: ClassVar[str] = ""  # why the jackknife is not the error of this metric, whose standard errors are then NaN
    log_interval: ClassVar[bool] = False  # whether intervals are symmetric about the logarithm of the value
    coverage: ClassVar[str] = ""  # where 95 % intervals cover less or more, as measured
    higher_is_better: ClassVar[bool] = True  # as a pruning criterion: whether units with large values are kept

    def __init_subclass__(cls) -> None:
        if cls.nan == Metric.nan:
            cls.nan = cls.section("NaN") or Metric.nan

    def __post_init__(self) -> None:
        for name, hint in self._hints().items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                fit = ", ".join(map(repr, get_args(hint)))
                raise ValueError(f"{self.names[0]}: {name} is {getattr(self, name)!r}; it takes {fit}")
            if hint in _PLAIN and not isinstance(getattr(self, name), _PLAIN[hint][0]):
                raise TypeError(f"{self.names[0]}: {name} is {shown(getattr(self, name))}; it is {_PLAIN[hint][1]}")
        for name, (fits, words) in self.limits.items():
            if not fits(getattr(self, name)):
                raise ValueError(f"{self.names[0]}: {name} is {getattr(self, name)}; {words}")

    @classmethod
    @cache
    def _hints(cls) -> Mapping[str, Any]:
        """The types of the options."""
        own, hints = {f.name for f in fields(cls)}, get_type_hints(cls)
        return {name: hint for name, hint in hints.items() if name in own}

    def needs(self) -> dict[str, Need]:
        """The statistics that ``__call__`` takes, by argument name."""
        return {}

    def stacked_needs(self) -> dict[str, Need]:
        """The statistics that ``__call__`` takes for the units of all layers side by side, of metrics with that option."""
        return {}

    def beside(self, weight: Any, **statistics: Any) -> dict[str, Tensor]:
        """Further columns or matrices beside the value, by the suffix of their name."""
        return {}

    def __call__(self, weight: Any, **statistics: Any) -> Tensor:
        """The value: (units,), (units, units) or ()."""
        raise TypeError(f"{type(self).__name__} has no formula")

    def check_group(self, name: str, group: GroupLayer) -> None:
        """Raises ValueError, naming the metric, where a pruning group lacks what the metric reads."""

    def counts(self, weight: Tensor | None, **statistics: Any) -> dict[str, int]:
        """How often the rule for an edge case was applied, by name, such as ``constant`` or ``saturated``."""
        return {}

    @classmethod
    def section(cls, title: str) -> str:
        """One section of the docstring, on one line: ``Formula``, ``Shapes``, ``Unit``, ``NaN``, ``Raises`` or ``Source``."""
        return section_of(cls.__doc__ or "", title)

    @classmethod
    def source(cls) -> str:
        """The reference for the definition."""
        return cls.section("Source")

    @property
    def options(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def shape(self) -> str:
        """The ``kind`` after ``reduce``: a mean over partners is one value per unit."""
        return "unit" if self.kind == "pair" and self.options.get("reduce") == "mean" else self.kind

    def compute(self, *unnamed: Any, **tensors: Any) -> Tensor:
        """The metric computed from tensors: the same formula as in a pass over data, applied to one batch.

        inputs (n, d) or (B, C, H, W), outputs likewise, weights (units, ...), labels (n,), targets (n,) or (n, t),
        logits (n, K), gradients shaped like outputs; for a convolution also its stride, padding, dilation and groups.
        Metrics about firing take as outputs what is behind the activation.
        covariance (d, d), of the inputs, stands for inputs in metrics that read nothing else of the data.
        Arrays and lists are converted. Raises ValueError for a missing tensor, and for shapes that do not fit each other;
        TypeError for a tensor that is not given by name.
        """
        if unnamed:
            raise TypeError(f"{self.names[0]}: compute() takes its tensors by name, as compute(inputs=..., weights=...)")
        return compute(self, tensors)


def mean_of_partners(pairs: Tensor) -> Tensor:
    """Mean over the partners j != i of a matrix with a zero diagonal, (N, N) -> (N,); NaN where N is 1."""
    return pairs.sum(1) / (len(pairs) - 1) if len(pairs) > 1 else pairs.new_full((len(pairs),), float("nan"))


def section_of(text: str, title: str) -> str:
    """One section of a docstring, on one line; empty where it is missing."""
    titles = "|".join(_SECTIONS)
    found = re.search(rf"^ *{title}:(.*?)(?=^ *(?:{titles}):|\Z)", text, re.DOTALL | re.MULTILINE)
    return " ".join(found[1].split()) if found else ""
