"""What a metric is: a pure function of statistics and weights, that says which it needs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from torch import Tensor

from nodelens.network.group_layer import GroupLayer

from .from_tensors import compute
from .need import Need

_SECTIONS = ("Formula", "Shapes", "Unit", "NaN", "Raises", "Source")


@dataclass(frozen=True)
class Metric:
    """Statistics and weights in, a value a unit (or a pair of units, or a layer) out.

    Options are fields: the config sets them and the table's metadata names them. Subclasses state ``names`` (the first is
    the long one), ``kind``, ``nan`` (when there is no answer) and, in their docstring, formula and source.
    """

    names: ClassVar[tuple[str, ...]] = ()
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # further names, each with options of its own
    kind: ClassVar[str] = "unit"  # unit | pair | layer | edge (two layers) | input (a value an input feature)
    weighted: ClassVar[bool] = False  # whether it reads a parameter of the layer
    # which: weight (units, fan_in), of a group all producers' side by side | tensor, as stored | change W - W0 | norm, the gammas
    # behind, (units, norms) | group, the pruning group as a GroupLayer | units, their number, the layer's name and the seed
    parameter: ClassVar[str] = "weight"
    reads_consumers: ClassVar[bool] = False  # whether it reads what consumes the units, which a layer's output does not tell
    whole_experts: ClassVar[bool] = False  # whether it scores whole experts of a mixture from data
    grouped: ClassVar[bool] = False  # whether it takes the groups' sums, a list, in place of the whole
    nan: ClassVar[str] = "never"
    higher_is_better: ClassVar[bool] = True  # as a pruning criterion: whether units with large values are kept

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                fit = ", ".join(map(repr, get_args(hint)))
                raise ValueError(f"{self.names[0]}: {name} is {getattr(self, name)!r}; it takes {fit}")

    def needs(self) -> dict[str, Need]:
        """What ``__call__`` takes, by the name of its argument."""
        return {}

    def __call__(self, weight: Any, **statistics: Any) -> Tensor:
        """The value: (units,), (units, units) or ()."""
        raise TypeError(f"{type(self).__name__} has no formula")

    def check_group(self, name: str, group: GroupLayer) -> None:
        """Raises ValueError, with the metric's name, where a pruning group does not show what the metric reads."""

    def counts(self, weight: Tensor | None, **statistics: Any) -> dict[str, int]:
        """How often a rule for an edge case was used, such as ``constant`` or ``saturated``."""
        return {}

    @classmethod
    def section(cls, title: str) -> str:
        """A part of the docstring on one line: ``Formula``, ``Shapes``, ``Unit``, ``NaN``, ``Raises`` or ``Source``."""
        return section_of(cls.__doc__ or "", title)

    @classmethod
    def source(cls) -> str:
        """Where the definition can be read."""
        return cls.section("Source")

    @property
    def options(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def shape(self) -> str:
        """unit, pair or layer: what the value has, after ``reduce``."""
        return "unit" if self.kind == "pair" and self.options.get("reduce") == "mean" else self.kind

    def compute(self, **tensors: Any) -> Tensor:
        """The metric from tensors in hand: the same formula as in a pass, fed with one batch.

        inputs (n, d) or (B, C, H, W), outputs likewise, weights (units, ...), labels (n,), targets (n,) or (n, t),
        logits (n, K), gradients like outputs; of a convolution its stride, padding, dilation, groups.
        Raises ValueError for a tensor that is missing.
        """
        return compute(self, tensors)


def mean_of_partners(pairs: Tensor) -> Tensor:
    """Mean over the partners j != i of a matrix with a zero diagonal, (N, N) -> (N,); NaN for a unit alone."""
    return pairs.sum(1) / (len(pairs) - 1) if len(pairs) > 1 else pairs.new_full((len(pairs),), float("nan"))


def section_of(text: str, title: str) -> str:
    """A part of a docstring on one line; empty where there is none."""
    titles = "|".join(_SECTIONS)
    found = re.search(rf"^ *{title}:(.*?)(?=^ *(?:{titles}):|\Z)", text, re.DOTALL | re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def _hints(cls: type[Metric]) -> Mapping[str, Any]:
    own = {f.name for f in fields(cls)}
    return {k: v for k, v in get_type_hints(cls).items() if k in own}
