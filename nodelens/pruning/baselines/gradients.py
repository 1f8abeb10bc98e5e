"""Criteria of the weights' own gradients: of all data together, or sample by sample."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ...distributed import reduce_tensor
from ...frame import Frame, logits_of
from ..axis import Axis, Cut, Role
from .base import Baseline, Found, added, entries, matrices, whole
from .passes import Loss, Need, Sums, differentiable

CHUNK = 1 << 26  # gradients held at once, 256 MB in float32
_UNFIT = (RuntimeError, NotImplementedError, ValueError, TypeError, KeyError, AttributeError)  # what a model may raise in a vmap


class _TensorSums(Sums):
    """Sums over samples in the shape of every tensor that a role cuts: totals {name: in its shape}, and the samples."""

    def __init__(self, model: nn.Module, axes: Sequence[Axis], *roles: Role):
        super().__init__(model, axes)
        cuts = {cut.name: cut for axis in axes for cut in matrices(model, axis, *roles)}
        self.tensors = {name: whole(model, cut) for name, cut in cuts.items()}
        self.totals = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in self.tensors.items()}
        self.samples = self.zeros(1)

    def begin(self, frame: Frame) -> None:
        super().begin(frame)
        self.samples += len(frame)

    def reduce(self) -> None:
        super().reduce()
        self.samples = reduce_tensor(self.samples)

    def mean(self, cut: Cut) -> Tensor:
        """The mean over samples, in the tensor's shape."""
        return self.totals[cut.name] / self.samples.to(self.totals[cut.name].device)


class GradientSums(_TensorSums):
    """G, the gradient of the loss of all data."""

    def __init__(self, model: nn.Module, axes: Sequence[Axis], *roles: Role):
        super().__init__(model, axes, *roles)
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

    def __init__(self, model: nn.Module, axes: Sequence[Axis], *roles: Role):
        super().__init__(model, axes, *roles)
        self.step = max(1, CHUNK // max(1, sum(t.numel() for t in self.tensors.values())))
        self.together = self.step > 1

    def end(self, logits: Tensor | None, loss: Loss) -> None:
        assert logits is not None
        with torch.enable_grad():
            z = logits.detach().requires_grad_()
            (slope,) = torch.autograd.grad(loss(z, self.frame.labels), z)
        for first in range(0, len(self.frame), self.step):
            self._add(_part(self.frame, first, self.step), slope[first : first + self.step])

    def _add(self, frame: Frame, slope: Tensor) -> None:
        if self.together and len(frame) > 1:
            try:
                together = self._at_once(frame, slope)
            except _UNFIT:
                self.together = False
            else:
                for name, several in together.items():
                    self.totals[name] += several.double().square().sum(0)
                return
        for gradients in self._one_by_one(frame, slope):
            for name, gradient in zip(self.tensors, gradients, strict=True):
                if gradient is not None:
                    self.totals[name] += gradient.double().square()

    def _at_once(self, frame: Frame, slope: Tensor) -> dict[str, Tensor]:
        """{name: (samples, in the tensor's shape)}."""

        def dim(value: object) -> int | None:
            return 0 if isinstance(value, Tensor) and value.ndim and len(value) == len(frame) else None

        dims = None, tuple(map(dim, frame.args)), {k: dim(v) for k, v in frame.kwargs.items()}, 0

        def linear(tensors: dict[str, Tensor], args: tuple, kwargs: dict, slope: Tensor) -> Tensor:
            args = tuple(v if d is None else v[None] for v, d in zip(args, dims[1], strict=True))
            kwargs = {k: v if dims[2][k] is None else v[None] for k, v in kwargs.items()}
            return (logits_of(torch.func.functional_call(self.model, tensors, args, kwargs))[0] * slope).sum()

        tensors = {name: tensor.detach() for name, tensor in self.tensors.items()}
        every = torch.func.vmap(torch.func.grad(linear), in_dims=dims)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # an operation that vmap loops over: right, if slow
            return every(tensors, frame.args, frame.kwargs, slope)

    def _one_by_one(self, frame: Frame, slope: Tensor) -> Iterator[Sequence[Tensor | None]]:
        tensors = list(self.tensors.values())
        for k in range(len(frame)):
            with differentiable(tensors), torch.enable_grad():
                logits = logits_of(_part(frame, k, 1).run(self.model))
                yield torch.autograd.grad((logits * slope[k : k + 1]).sum(), tensors, allow_unused=True)


def _part(frame: Frame, first: int, samples: int) -> Frame:
    """Some samples of a frame."""
    return frame.map(lambda t: t[first : first + samples])


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

    def __call__(self, axis: Axis, found: Found) -> Tensor:
        total = found.sums[self.sums()[0]].totals
        cuts = matrices(found.model, axis, "producer")
        return added((cut.by_unit(found.model) * entries(cut, total[cut.name])).abs().sum(1) for cut in cuts)


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

    def __call__(self, axis: Axis, found: Found) -> Tensor:
        squares, model = found.sums[self.sums()[0]], found.model
        cuts = matrices(model, axis, "producer")
        return 0.5 * added((cut.by_unit(model).double().square() * entries(cut, squares.mean(cut))).sum(1) for cut in cuts)


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

    def __call__(self, axis: Axis, found: Found) -> Tensor:
        sums, model = [found.sums[need] for need in self.sums()], found.model
        cuts = matrices(model, axis, "producer", "consumer")
        parts = []
        for cut in cuts:
            w = cut.by_unit(model).double()
            if self.form == "el2":
                parts.append((w.square() * entries(cut, sums[0].mean(cut))).sum(1))
            elif self.form == "mix":
                first, second = (entries(cut, each.mean(cut)) for each in sums)
                parts.append((w * first - w.square() * second / 2).abs().sum(1))
            else:
                change = w * entries(cut, sums[0].totals[cut.name])
                parts.append((change if self.form == "vector" else change.abs()).sum(1))
        return added(parts).abs()


BASELINES: tuple[type[Baseline], ...] = (Gradient, Fisher, LLMPruner)
