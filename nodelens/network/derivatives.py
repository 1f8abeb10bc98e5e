"""Derivatives of a model's predictions with respect to layers, several at once."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .objective import Objective

_UNFIT = (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError)  # what an operation without a batched form raises


class Pullback:
    """Vectors pulled back from a tensor to layers: the products v'J with the Jacobian J of the tensor.

    Several vectors at once where all operations allow it (``is_grads_batched``), else one after the other.
    """

    def __init__(self) -> None:
        self.together = True

    def __call__(self, z: Tensor, edges: Sequence[GradientEdge], vectors: Tensor, keep_graph: bool = False) -> list[Tensor | None]:
        """Products (k, *shape of the layer) for vectors (k, *shape of z); None for a layer on which z does not depend.

        keep_graph: whether the products can be differentiated again.
        """
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "create_graph": keep_graph}
        if not z.requires_grad:
            return [None] * len(edges)
        if self.together and len(vectors) > 1:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "There is a performance drop")  # a loop over some operation: correct but slow
                    return list(torch.autograd.grad(z, edges, vectors, is_grads_batched=True, **options))
            except _UNFIT:
                self.together = False
        each = [torch.autograd.grad(z, edges, v, **options) for v in vectors]
        return [None if any(g is None for g in own) else torch.stack(own) for own in zip(*each, strict=True)]


def factor(objective: Objective, z: Tensor, labels: Tensor | None) -> Tensor:
    """Rows S whose sum of s s' is the Hessian of each prediction's loss with respect to its outputs.

    z: predictions (B, K) or (B, P, K), as ``counted`` returns them. Returns (K, *shape of z): row k of every prediction. For
    cross-entropy sqrt(p_k) (e_k - p), p the softmax. Rows of predictions that do not count are 0.
    """
    z = z.detach()
    eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    eye = eye.reshape(z.shape[-1], *[1] * (z.ndim - 1), z.shape[-1])
    p = z.softmax(-1)
    return p.movedim(-1, 0).sqrt()[..., None] * (eye - p)
