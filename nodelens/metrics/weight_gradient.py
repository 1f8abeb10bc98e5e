"""Pruning criteria of the weights' own gradients: of all data together, sample by sample, or along a short training."""

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
    """What scores of the gradients of weights share. P(u) are the weights that make a unit, K(u) those that read it."""

    weighted: ClassVar = True
    parameter: ClassVar = "group"


@dataclass(frozen=True)
class Gradient(_OfWeightGradients):
    """First-order change of the loss of all data, weight by weight.

    Formula: sum of |w G_w| over P(u), G the gradient of the loss summed over all data
    Shapes: -> (units,)
    Unit:   that of the loss, >= 0
    NaN:    never
    Source: definition; Ma et al. 2023, 2305.11627, eq. 5, first term, of what makes the unit
    """

    names: ClassVar = ("gradient",)

    def needs(self) -> dict[str, Need]:
        return {"g": Need(WeightGradients, "model", options=("producer",))}  # type: ignore[arg-type]

    def __call__(self, weight: GroupLayer, g: WeightGradients) -> Tensor:
        slices, model = weight.pieces("producer"), weight.module
        return added([(p.by_unit(model).double().cpu() * entries(p, g.totals[p.name]).cpu()).abs().sum(1) for p in slices])


@dataclass(frozen=True)
class Fisher(_OfWeightGradients):
    """Optimal brain damage with the empirical Fisher information's diagonal in the place of the Hessian's.

    Gradients are each sample's own, over its positions together; squares of a batch's gradient are something else.

    Formula: 0.5 sum of w^2 E_n[g_nw^2] over P(u)
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
    """Change of the loss when all weights that make or read a unit go, to first or second order.

    ``el1`` and ``el2`` take weights one by one, ``mix`` both orders of each, ``vector`` the size of the sum over all of the unit's
    (the authors' code adds the sizes of the sums of single matrices). In ``mix`` G is
    the mean over samples, as h is: a sum beside a mean would weigh the two by the number of samples. The paper calibrates on 10
    texts of 64 tokens: take 128 or more.

    Formula: over P(u) and K(u): el1 sum |w G|; el2 sum w^2 h; mix sum |w G/N - w^2 h / 2|; vector |sum w G|; G the gradient of the
             loss summed over the N samples, h = E_n[g_nw^2] of each sample's own
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
    """How far the weights that make a unit move away from zero in a short training.

    Every floating parameter of a copy is trained by plain SGD, in eval mode, on the mean loss of each batch (a text's over its
    tokens), in the order of the data: here batches matter, as they do in training. The model itself stays as it is. Several
    processes train a copy each, on their own data, and add up.

    Formula: -sum over steps of g_w w over P(u), g the gradient of the batch's mean loss, w before the step
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
            raise ValueError(f"movement: lr is {self.lr}, epochs {self.epochs}; both are above 0")

    def needs(self) -> dict[str, Need]:
        return {"steps": Need(MovementSums, "model", options=(self.lr, self.epochs))}  # type: ignore[arg-type]

    def __call__(self, weight: GroupLayer, steps: MovementSums) -> Tensor:
        return steps.totals[weight.name].cpu()


def added(parts: list[Tensor]) -> Tensor:
    """The sum of parts that may lie on several devices, on the CPU."""
    return torch.stack([part.cpu() for part in parts]).sum(0)


METRICS: tuple[type[Metric], ...] = (Gradient, Fisher, LLMPruner, Movement)
