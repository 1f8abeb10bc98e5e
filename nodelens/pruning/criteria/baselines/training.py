"""The criterion of a short training: which weights move away from zero."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from nodelens.network.batch import logits_of
from nodelens.network.groups import PruningGroup

from .base import Baseline, Found, entries, matrices, whole
from .passes import Loss, Need, Sums


class MovementSums(Sums):
    """-g_w w, added up over the steps of plain SGD on a copy of the model: totals {group: (units,)}."""

    forward: ClassVar = False

    def __init__(self, model: nn.Module, groups: Sequence[PruningGroup], lr: float, epochs: int):
        super().__init__(model, groups)
        self.lr, self.rounds = lr, epochs
        self.copy = copy.deepcopy(model).eval()
        self.trained = [p.requires_grad_() for p in self.copy.parameters() if p.is_floating_point()]
        self.totals = {group.name: self.zeros(group.n) for group in groups}

    def end(self, logits: Tensor | None, loss: Loss) -> None:
        frame = self.batch
        with torch.enable_grad():
            total = loss(logits_of(frame.run(self.copy)), frame.labels) / int(frame.tokens.sum().clamp_min(1))
            gradients = torch.autograd.grad(total, self.trained, allow_unused=True)
        steps = {id(p): g for p, g in zip(self.trained, gradients, strict=True) if g is not None}
        with torch.no_grad():
            for group in self.groups:
                for piece in matrices(self.copy, group, "producer"):
                    weight = whole(self.copy, piece)
                    if id(weight) in steps:
                        pull = piece.by_unit(self.copy).double() * entries(piece, steps[id(weight)])
                        self.totals[group.name] -= pull.sum(1).to(self.device)
            for p in self.trained:
                if id(p) in steps:
                    p.sub_(self.lr * steps[id(p)])


@dataclass(frozen=True)
class Movement(Baseline):
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
    needs: ClassVar = "training"
    lr: float = 1e-3
    epochs: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr <= 0 or self.epochs < 1:
            raise ValueError(f"movement: lr is {self.lr}, epochs {self.epochs}; both are above 0")

    def sums(self) -> tuple[Need, ...]:
        return (Need(MovementSums, (self.lr, self.epochs)),)

    def __call__(self, group: PruningGroup, found: Found) -> Tensor:
        return found.sums[self.sums()[0]].totals[group.name].cpu()


BASELINES: tuple[type[Baseline], ...] = (Movement,)
