"""Derivatives of a graph, several at once: vectors pulled back from outputs to layers, or pushed forward from inputs to layers."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

_UNFIT = (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError)  # what an operation without a batched form raises
Place = Tensor | GradientEdge
_grad: Any = torch.autograd.grad  # its stub has no list of both kinds of places


class Roots:
    """R with R'R = WW' of the weight W of a Linear, (r, units), computed once for all batches with the same weight."""

    def __init__(self) -> None:
        self.last: tuple[Tensor, Tensor, Tensor] | None = None

    def of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """R and WW', float64, from W' (inputs, units)."""
        if self.last is None or self.last[0].shape != weight.shape or not torch.equal(self.last[0], weight):
            wide = weight.detach().double()
            self.last = weight.detach().clone(), torch.linalg.qr(wide, mode="r").R, wide.T @ wide
        return self.last[1:]


class Differentiation:
    """Products of vectors with Jacobians.

    Several vectors at once where all operations allow it (``is_grads_batched``), else one after the other.
    """

    def __init__(self) -> None:
        self.together, self.roots = True, Roots()

    def pull(self, outputs: Sequence[Place], places: Sequence[Place], vectors: Sequence[Tensor]) -> list[Tensor | None]:
        """Products v'J (k, *shape of each place) for vectors (k, *shape of each output); None for a place they do not read."""
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
        count = len(vectors[0])
        if self.together and count > 1:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "There is a performance drop")  # a loop over some operation: correct but slow
                    return list(_grad(outputs, places, vectors, is_grads_batched=True, **options))
            except _UNFIT:
                self.together = False
        each = [_grad(outputs, places, [v[k] for v in vectors], **options) for k in range(count)]
        return [None if any(g is None for g in own) else torch.stack(own) for own in zip(*each, strict=True)]

    def push(self, forward: "Forward", vectors: Sequence[Tensor]) -> Tensor | None:
        """Products J w (k, *shape of a layer) for vectors w (k, *shape of each input); None for a layer that does not read them."""
        read = [(slope, w) for slope, w in zip(forward.slopes, vectors, strict=True) if slope is not None and slope.requires_grad]
        if not read:
            return None
        slopes, own = zip(*read, strict=True)
        return self.pull(slopes, [forward.dual], own)[0]


class Forward:
    """The derivative J of a layer with respect to inputs, as J'u of a vector u, which is linear in u: its derivative is J.

    This needs no forward mode, which many operations lack, only derivatives of derivatives.
    """

    def __init__(self, place: GradientEdge, like: Tensor, inputs: Sequence[Place]):
        self.dual = torch.zeros_like(like).requires_grad_()
        self.slopes = _grad([place], inputs, [self.dual], create_graph=True, allow_unused=True)
