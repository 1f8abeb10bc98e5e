"""Criteria of the weights' own gradients: of all data together, or sample by sample."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from nodelens.network.batch import Batch, logits_of
from nodelens.network.groups import GroupSlice, PruningGroup, Role
from nodelens.statistics.processes import reduce_tensor

from .base import Baseline, Found, added, entries, matrices, whole
from .passes import Loss, Need, Sums, differentiable

CHUNK = 1 << 26  # gradients held at once, 256 MB in float32
_UNFIT = (RuntimeError, NotImplementedError, ValueError, TypeError, KeyError, AttributeError)  # what a model may raise in a vmap


class _TensorSums(Sums):
    """Sums over samples in the shape of every tensor that a role slices: totals {name: in its shape}, and the samples."""

    def __init__(self, model: nn.Module, groups: Sequence[PruningGroup], *roles: Role):
        super().__init__(model, groups)
        slices = {piece.name: piece for group in groups for piece in matrices(model, group, *roles)}
        self.tensors = {name: whole(model, piece) for name, piece in slices.items()}
        self.totals = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in self.tensors.items()}
        self.samples = self.zeros(1)

    def begin(self, batch: Batch) -> None:
        super().begin(batch)
        self.samples += len(batch)

    def reduce(self) -> None:
        super().reduce()
        self.samples = reduce_tensor(self.samples)

    def mean(self, piece: GroupSlice) -> Tensor:
        """The mean over samples, in the tensor's shape."""
        return self.totals[piece.name] / self.samples.to(self.totals[piece.name].device)


class GradientSums(_TensorSums):
    """G, the gradient of the loss of all data."""

    def __init__(self, model: nn.Module, groups: Sequence[PruningGroup], *roles: Role):
        super().__init__(model, groups, *roles)
        self.parameters = list(self.tensors.values())

    def take(self, gradients: Sequence[Tensor | None]) -> None:
        for name, gradient in zip(self.tensors, gradients, strict=True):
            if gradient is not None:
                self.totals[name] += gradient


class SampleGradientSums(_TensorSums):
    """Squares of each sample's own gradient.

    The slope of the loss in the logits is taken for the whole batch; what remains is linear in the logits, and differentiated for
    many samples at once (``torch.func.vmap``) or, where the model does not bear that, for one after another.
    """

    def __init__(self, model: nn.Module, groups: Sequence[PruningGroup], *roles: Role):
        super().__init__(model, groups, *roles)
        self.step = max(1, CHUNK // max(1, sum(t.numel() for t in self.tensors.values())))
        self.together = self.step > 1

    def end(self, logits: Tensor | None, loss: Loss) -> None:
        assert logits is not None
        with torch.enable_grad():
            z = logits.detach().requires_grad_()
            (slope,) = torch.autograd.grad(loss(z, self.batch.labels), z)
        for first in range(0, len(self.batch), self.step):
            self._add(_part(self.batch, first, self.step), slope[first : first + self.step])

    def _add(self, batch: Batch, slope: Tensor) -> None:
        if self.together and len(batch) > 1:
            try:
                together = self._at_once(batch, slope)
            except _UNFIT:
                self.together = False
            else:
                for name, several in together.items():
                    self.totals[name] += several.double().square().sum(0)
                return
        for gradients in self._one_by_one(batch, slope):
            for name, gradient in zip(self.tensors, gradients, strict=True):
                if gradient is not None:
                    self.totals[name] += gradient.double().square()

    def _at_once(self, batch: Batch, slope: Tensor) -> dict[str, Tensor]:
        """{name: (samples, in the tensor's shape)}."""

        def dim(value: object) -> int | None:
            return 0 if isinstance(value, Tensor) and value.ndim and len(value) == len(batch) else None

        dims = None, tuple(map(dim, batch.args)), {k: dim(v) for k, v in batch.kwargs.items()}, 0

        def linear(tensors: dict[str, Tensor], args: tuple, kwargs: dict, slope: Tensor) -> Tensor:
            args = tuple(v if d is None else v[None] for v, d in zip(args, dims[1], strict=True))
            kwargs = {k: v if dims[2][k] is None else v[None] for k, v in kwargs.items()}
            return (logits_of(torch.func.functional_call(self.model, tensors, args, kwargs))[0] * slope).sum()

        tensors = {name: tensor.detach() for name, tensor in self.tensors.items()}
        every = torch.func.vmap(torch.func.grad(linear), in_dims=dims)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # an operation that vmap loops over: right, if slow
            return every(tensors, batch.args, batch.kwargs, slope)

    def _one_by_one(self, batch: Batch, slope: Tensor) -> Iterator[Sequence[Tensor | None]]:
        tensors = list(self.tensors.values())
        for k in range(len(batch)):
            with differentiable(tensors), torch.enable_grad():
                logits = logits_of(_part(batch, k, 1).run(self.model))
                yield torch.autograd.grad((logits * slope[k : k + 1]).sum(), tensors, allow_unused=True)


def _part(batch: Batch, first: int, samples: int) -> Batch:
    """Some samples of a batch."""
    return batch.map(lambda t: t[first : first + samples])


@dataclass(frozen=True)
class Gradient(Baseline):
    """First-order change of the loss of all data, weight by weight.

    Formula: sum of |w G_w| over P(u), G the gradient of the loss summed over all data
    Shapes: -> (units,)
    Unit:   that of the loss, >= 0
    NaN:    never
    Source: definition; Ma et al. 2023, 2305.11627, eq. 5, first term, of what makes the unit
    """

    names: ClassVar = ("gradient",)
    needs: ClassVar = "gradients"

    def sums(self) -> tuple[Need, ...]:
        return (Need(GradientSums, ("producer",)),)

    def __call__(self, group: PruningGroup, found: Found) -> Tensor:
        total = found.sums[self.sums()[0]].totals
        slices = matrices(found.model, group, "producer")
        return added((piece.by_unit(found.model) * entries(piece, total[piece.name])).abs().sum(1) for piece in slices)


@dataclass(frozen=True)
class Fisher(Baseline):
    """Optimal brain damage with the empirical Fisher information's diagonal in the place of the Hessian's.

    Gradients are each sample's own, over its positions together; squares of a batch's gradient are something else.

    Formula: 0.5 sum of w^2 E_n[g_nw^2] over P(u)
    Shapes: -> (units,)
    Unit:   that of the loss squared, >= 0
    NaN:    never
    Source: LeCun et al. 1990, Optimal Brain Damage, eq. 5; caveat: Kunstner et al. 2019, 1905.12558
    """

    names: ClassVar = ("fisher",)
    needs: ClassVar = "sample_gradients"

    def sums(self) -> tuple[Need, ...]:
        return (Need(SampleGradientSums, ("producer",)),)

    def __call__(self, group: PruningGroup, found: Found) -> Tensor:
        squares, model = found.sums[self.sums()[0]], found.model
        slices = matrices(model, group, "producer")
        return 0.5 * added(
            (piece.by_unit(model).double().square() * entries(piece, squares.mean(piece))).sum(1) for piece in slices
        )


@dataclass(frozen=True)
class LLMPruner(Baseline):
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
    needs: ClassVar = "gradients"
    form: Literal["el1", "el2", "mix", "vector"] = "el1"

    def sums(self) -> tuple[Need, ...]:
        first, second = (Need(kind, ("producer", "consumer")) for kind in (GradientSums, SampleGradientSums))
        return {"el2": (second,), "mix": (first, second)}.get(self.form, (first,))

    def __call__(self, group: PruningGroup, found: Found) -> Tensor:
        sums, model = [found.sums[need] for need in self.sums()], found.model
        slices = matrices(model, group, "producer", "consumer")
        parts = []
        for piece in slices:
            w = piece.by_unit(model).double()
            if self.form == "el2":
                parts.append((w.square() * entries(piece, sums[0].mean(piece))).sum(1))
            elif self.form == "mix":
                first, second = (entries(piece, each.mean(piece)) for each in sums)
                parts.append((w * first - w.square() * second / 2).abs().sum(1))
            else:
                change = w * entries(piece, sums[0].totals[piece.name])
                parts.append((change if self.form == "vector" else change.abs()).sum(1))
        return added(parts).abs()


BASELINES: tuple[type[Baseline], ...] = (Gradient, Fisher, LLMPruner)
