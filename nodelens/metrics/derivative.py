"""Which derivatives an association adds up: the option of a Need at the port ``association``."""

from dataclasses import dataclass, field
from typing import Literal

Of = Literal["predictions", "loss", "hessian", "inputs", "values"]
Method = Literal["auto", "exact", "probes", "sampled", "empirical"]


@dataclass(frozen=True)
class Derivative:
    """Vectors p of each row of units h, whose products p p' are added up; for a Hessian pairs v and Hv.

    of: ``predictions``: p = J'v, J the derivative of the predictions with respect to h.
        ``loss``: the same, with v v' adding up to the Hessian of the loss with respect to the predictions.
        ``hessian``: of the loss with respect to h itself.
        ``inputs``: p = J w, J the derivative of h with respect to the inputs of the model.
        ``values``: p = h, for several layers side by side.
    method: how, see ``AssociationMethods`` of the engine, which settles ``auto`` for each layer
    vectors: number of random vectors for each row; 0 for all vectors of a basis
    """

    of: Of
    method: Method = "auto"
    vectors: int = 0
    folds: int = 1  # in which the random vectors are kept apart: their spread is the error of the estimate
    refused: str = ""  # why it is not computed at a layer
    why: str = field(default="", compare=False)  # the reason for the method: what is computed does not depend on it

    def __str__(self) -> str:
        return f"{self.of}, {self.method}" + (f" {self.vectors}" if self.vectors else "")
