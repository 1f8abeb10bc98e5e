"""The options of the pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from nodelens.messages import nearest
from nodelens.network.targets import Loss, summed_loss

from .covariance import LIMIT
from .layout import Reduce


@dataclass(frozen=True)
class AnalyzeOptions:
    """How units are measured. ``nl.analyze`` takes each of these by name too.

    seed:       of what is drawn: samples of rows, permutations, groups of samples without ids
    groups:     of samples, for the jackknife
    positions:  how many positions of each image pair statistics read. None: all
    precision:  of products, float32 or float64; rows that are float64 keep it
    pairs:      of layers that edge metrics compare: consecutive, all, or names
    bias:       whether to add the jackknife's estimate of each value's bias, ``<metric>_bias``; nothing is subtracted
    loss:       of (logits, labels), summed over the batch
    reduce:     how the values at several places of a pruning group's unit are combined: sum, mean, max, prod, first
    covariance: for layers of more than ``width`` units whose products a metric needs: diagonal, sample:<count> or
                sketch:<count>, as in ``nodelens.engine.covariance``. None: an error that shows these choices
    budget:     bytes that the sums may take
    max_passes: how often the data may be read, a part of the layers each time, so that the sums fit

    Raises ValueError for an unknown ``reduce``.
    """

    seed: int = 0
    groups: int = 8
    positions: int | None = None
    precision: str = "float32"
    pairs: str | Sequence[Sequence[str]] = "consecutive"
    bias: bool = False
    loss: Loss = summed_loss
    reduce: Reduce = "sum"
    covariance: str | None = None
    width: int = LIMIT
    budget: float | None = None
    max_passes: int = 1

    def __post_init__(self) -> None:
        if self.reduce not in get_args(Reduce):
            raise ValueError(f"reduce is {self.reduce!r}; it is {', '.join(get_args(Reduce))}")

    def with_named(self, named: Mapping[str, Any]) -> "AnalyzeOptions":
        """These options with others in place of some. Raises TypeError for an unknown name, with the nearest one."""
        check_names("nl.analyze", named, [field.name for field in fields(self)])
        return replace(self, **named)


def check_names(call: str, named: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises TypeError for an option that a call does not have, with the nearest one."""
    unknown = next((name for name in named if name not in known), None)
    if unknown is not None:
        raise TypeError(f"{call} has no option {unknown!r}.{nearest(unknown, known)} Options are {', '.join(known)}")
