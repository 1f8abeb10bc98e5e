"""What a unit matters to the loss."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..statistics import Moments, Sizes
from .base import Metric, Need


@dataclass(frozen=True)
class Taylor(Metric):
    """First-order change of the loss when a unit is set to zero: E|q|, q = y dL/dy, L the SUMMED loss.

    Of a map q is summed over a sample's positions before the absolute value (``spatial: sum_then_abs``): one row a sample,
    the change of its loss when the whole map goes; ``per_position`` takes each position as a row. ``mode: mean_abs`` is
    |E q|, ``sq_mean`` E q^2. No value depends on the batch size or on a loss scale of the trainer.

    Shapes: q over rows of width units -> (units,)
    Unit:   that of the loss (squared for ``sq_mean``), >= 0. Loss w u, u ~ N(0, 1): 0.7979 |w|
    NaN:    no rows
    Raises: ValueError when there are no labels to take a loss from
    Source: Molchanov et al. 2017, 1611.06440, eq. 7; Molchanov et al. 2019, 1906.10771, eq. 8
    """

    names: ClassVar = ("taylor_saliency", "taylor")
    nan: ClassVar = "no rows"
    mode: Literal["abs_mean", "mean_abs", "sq_mean"] = "abs_mean"
    spatial: Literal["sum_then_abs", "per_position"] = "sum_then_abs"

    def needs(self) -> dict[str, Need]:
        view = "samples" if self.spatial == "sum_then_abs" else "positions"
        return {"q": Need(Sizes if self.mode == "abs_mean" else Moments, "output*grad", view)}

    def __call__(self, weight: Tensor | None, q: Sizes | Moments) -> Tensor:  # type: ignore[override]
        if isinstance(q, Sizes):
            return q.absolute / q.n
        return q.mean.abs() if self.mode == "mean_abs" else q.mean_square.clamp_min(0)
