"""Which derivatives an association adds up: an option of a Need at the port ``association``."""

from dataclasses import dataclass
from typing import Literal

FOLDS = 8  # of probes, whose spread is the standard error over probes

Of = Literal["predictions", "loss", "inputs", "values"]


@dataclass(frozen=True)
class Derivative:
    """Vectors p of each row of units h, whose products p p' are added up.

    of: ``predictions``: p = J'v, J the derivative of the predictions with respect to h, v vectors of predictions.
        ``curvature``: the same, with v v' adding up to the Hessian of the loss with respect to the predictions.
    method: exact, probes, sampled or empirical. vectors: number of probes or draws for each row; 0 for all vectors of a basis
    """

    of: str
    method: str
    vectors: int = 0

    @property
    def folds(self) -> int:
        """How many folds the vectors are in."""
        return min(self.vectors, FOLDS) if self.vectors > 1 else 1

    @property
    def sizes(self) -> list[int]:
        """How many vectors each fold has."""
        return [len(range(fold, self.vectors, self.folds)) for fold in range(self.folds)] if self.vectors else [1]

    def __str__(self) -> str:
        return f"{self.of}, {self.method}" + (f" {self.vectors}" if self.vectors else "")
