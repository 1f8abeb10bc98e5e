"""Pruning criteria from gradients of the weights: over all data, per sample, or during a short training."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nodelens.network.group_layer import GroupLayer

from .base import Metric
from .model_sums import ModelSums, MovementSums, SampleGradients, WeightGradients, entries
from .need import Need


@dataclass(frozen=True)
class _OfWeightGradients(Metric):
    """Shared by scores from weight gradients. P(u) are the weights that produce a unit, K(u) those that consume it."""

    weighted: ClassVar = True
    parameter: ClassVar = "group"


@dataclass(frozen=True)
class Gradient(_OfWeightGradients):
    """First-order change of the loss over all data when a weight is set to zero, in absolute value, summed over a unit's weights.

    Formula: sum of |w G_w| over P(u), the weights that produce the unit, G the gradient of the loss summed over all data
    Shapes: -> (units,)
    Unit:   that of the loss, >= 0
    NaN:    never
    Source: definition; Ma et al. 2023, 2305.11627, eq. 5, first term, over the producers
    """

    names: ClassVar = ("gradient",)

    def needs(self) -> dict[str, Need]:
        return {"g": Need(WeightGradients, "model", options=("producer",))}  # type: ignore[arg-type]

    def __call__(self, weight: GroupLayer, g: WeightGradients) -> Tensor:
        slices, model = weight.pieces("producer"), weight.module
        return added([(p.by_unit(model).double().cpu() * entries(p, g.totals[p.name]).cpu()).abs().sum(1) for p in slices])


@dataclass(frozen=True)
class Fisher(_OfWeightGradients):
    """Optimal Brain Damage with the diagonal of the empirical Fisher information in place of the Hessian.

    Gradients are per sample, summed over its positions; squares of batch gradients would give a different value.

    Formula: 0.5 sum of w^2 E_n[g_nw^2] over P(u), the weights that produce the unit, g_n the gradient of sample n
    Shapes: -> (units,)
    Unit:   that of the loss squared, >= 0
    NaN:    never
    Source: LeCun et al. 1990, Optimal Brain Damage, eq. 5; caveat: Kunstner et al. 2019, 1905.12558
    """

    names: ClassVar = ("fisher",)

    def needs(self) -> dict[str, Need]:
        return {"g": Need(SampleGradients, "model", options=("producer",))}  # type: ignore[arg-type]

    def __call__(self, weight: GroupLayer, g: SampleGradients) -> Tensor:
        slices, model = weight.pieces("producer"), weight.module
        return 0.5 * added([(p.by_unit(model).double().square().cpu() * entries(p, g.mean(p)).cpu()).sum(1) for p in slices])


@dataclass(frozen=True)
class LLMPruner(_OfWeightGradients):
    """First- or second-order change of the loss when all weights that produce or consume a unit are removed.

    ``el1`` and ``el2`` sum first- and second-order terms over single weights, ``mix`` combines both orders per weight, and
    ``vector`` is the absolute value of the sum over all weights of the unit (the authors' code adds absolute sums per matrix). In
    ``mix`` both G and h are means over samples, so that their balance does not depend on the number of samples. The paper
    calibrates on 10 texts of 64 tokens; use 128 or more.

    Formula: over the weights that produce or consume the unit: el1 sum |w G|; el2 sum w^2 h; mix sum |w G/N - w^2 h / 2|; vector
             |sum w G|; G the gradient of the loss summed over the N samples, h = E_n[g_nw^2], g_n the gradient of sample n
    Shapes: -> (units,)
    Unit:   that of the loss, >= 0; for el2 of the loss squared
    NaN:    never
    Source: Ma et al. 2023, 2305.11627, eqs. 3 to 5
    """

    names: ClassVar = ("llm_pruner",)
    form: Literal["el1", "el2", "mix", "vector"] = "el1"

    def needs(self) -> dict[str, Need]:
        kinds: dict[str, type[ModelSums]] = {"first": WeightGradients, "second": SampleGradients}
        read = {"el2": ("second",), "mix": ("first", "second")}.get(self.form, ("first",))
        return {name: Need(kinds[name], "model", options=("producer", "consumer")) for name in read}  # type: ignore[arg-type]

    def __call__(self, weight: GroupLayer, first: WeightGradients | None = None, second: SampleGradients | None = None) -> Tensor:
        parts = []
        for piece in weight.pieces("producer", "consumer"):
            w = piece.by_unit(weight.module).double().cpu()
            change = None if first is None else w * entries(piece, first.totals[piece.name]).cpu()
            square = None if second is None else w.square() * entries(piece, second.mean(piece)).cpu()
            if change is not None and square is not None and first is not None:
                parts.append((change / first.totals["samples"].cpu() - square / 2).abs().sum(1))
            else:
                either = square if change is None else change if self.form == "vector" else change.abs()
                assert either is not None
                parts.append(either.sum(1))
        return added(parts).abs()


@dataclass(frozen=True)
class Movement(_OfWeightGradients):
    """How far the weights that produce a unit move away from zero in a short training.

    A copy of the model is trained with plain SGD in evaluation mode, on the mean loss of each batch (for texts, per token), in the
    order of the data: as in training, the result depends on the batches. The model itself does not change. With several processes,
    each trains a copy on its own data and the sums are added.

    Formula: -sum over steps of g_w w over the weights that produce u, g the gradient of the batch's mean loss, w before the step
    Shapes: -> (units,)
    Unit:   that of the loss; positive = away from zero, negative = towards it
    NaN:    never
    Raises: ValueError for a learning rate that is not positive, epochs below 1, or an iterator with epochs above 1
    Source: Sanh et al. 2020, 2005.07683, eq. 5
    """

    names: ClassVar = ("movement",)
    lr: float = 1e-3
    epochs: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr <= 0 or self.epochs < 1:
            raise ValueError(f"movement: lr is {self.lr}, epochs {self.epochs}; both must be above 0")

    def needs(self) -> dict[str, Need]:
        return {"steps": Need(MovementSums, "model", options=(self.lr, self.epochs))}  # type: ignore[arg-type]

    def __call__(self, weight: GroupLayer, steps: MovementSums) -> Tensor:
        return steps.totals[weight.name].cpu()


def added(parts: list[Tensor]) -> Tensor:
    """The sum, on the CPU, of tensors from several devices."""
    return torch.stack([part.cpu() for part in parts]).sum(0)
