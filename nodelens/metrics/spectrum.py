"""In how many directions a layer varies."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..linalg import entropy_count, spectrum
from ..statistics import Gram
from .base import Metric, Need, View


@dataclass(frozen=True)
class EffectiveRank(Metric):
    """exp of the entropy of the singular values' shares, s_k/sum s, s = sqrt of the covariance's eigenvalues.

    Eigenvalues below 2.4e-7 of the largest count as 0: a layer wider than what it reads has such, and float32 sums do not
    resolve them.

    Shapes: y over rows of width units -> ()
    Unit:   directions, in [1, units]; eigenvalues 4, 2, 1, 1: 3.828
    NaN:    fewer than two rows, or no variance
    Source: Roy & Vetterli 2007, EUSIPCO, definition 1
    """

    names: ClassVar = ("effective_rank", "sv_effective_rank")
    kind: ClassVar = "layer"
    nan: ClassVar = "fewer than two rows, or no variance"
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Gram, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Gram) -> Tensor:  # type: ignore[override]
        return entropy_count(spectrum(y.covariance).sqrt())


@dataclass(frozen=True)
class ParticipationRatio(Metric):
    """(sum lam)^2 / sum lam^2 = (tr C)^2 / ||C||_F^2 of the covariance C: no eigenvalues are needed.

    Read low from few rows: 1/value is about 1/n + 1/truth.

    Shapes: y over rows of width units -> ()
    Unit:   directions, in [1, units]; eigenvalues 4, 2, 1, 1: 2.909
    NaN:    fewer than two rows, or no variance
    Source: Gao et al. 2017, bioRxiv 214262, eq. 5
    """

    names: ClassVar = ("participation_ratio", "d_pr")
    kind: ClassVar = "layer"
    nan: ClassVar = "fewer than two rows, or no variance"
    view: View = "positions"

    def needs(self) -> dict[str, Need]:
        return {"y": Need(Gram, "output", self.view)}

    def __call__(self, weight: Tensor | None, y: Gram) -> Tensor:  # type: ignore[override]
        return y.covariance.trace().square() / torch.linalg.matrix_norm(y.covariance).square()
