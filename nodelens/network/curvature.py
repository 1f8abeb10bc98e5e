"""The curvature of a loss with respect to predictions, as vectors whose products v v' add up to its Hessian there."""

from typing import NamedTuple

import torch
from torch import Tensor

from .batch import Batch
from .missing import which_count
from .objective import Objective
from .random_vectors import rows_of_tokens, signs, uniforms
from .tasks import BY_VALUE


class Predictions(NamedTuple):
    """The predictions of a batch that are differentiated.

    Shapes: z (B, P, K), with its graph; counted (B, P) bool; rows (B, P) int64, numbers that padding does not change;
            labels (B, P, ...) or None
    """

    z: Tensor
    counted: Tensor
    rows: Tensor
    labels: Tensor | None

    @classmethod
    def of(cls, predictions: Tensor, batch: Batch, objective: Objective, of_loss: bool) -> "Predictions":
        """All predictions at tokens that count or, of the loss, those with a label."""
        y, mask, by_value = batch.labels, batch.predicting, objective.task in BY_VALUE
        if of_loss and y is not None and not by_value:
            z, y = objective.predictions(predictions, y)
            counted = which_count(y)
        else:
            of_values = by_value and of_loss and y is not None
            z, y = objective.values(predictions, y) if of_values else (objective.aligned(predictions, y), None)
            z = z[:, None] if z.ndim == 1 else z.flatten(1) if by_value else z
            y = None if y is None else y.flatten(1)
            counted = mask if mask is not None and mask.shape == z.shape[:-1] else z.new_ones(z.shape[:-1], dtype=torch.bool)
        z, counted = (z[:, None], counted[:, None]) if z.ndim == 2 else (z, counted)
        y = None if y is None else y[:, None] if y.ndim < 3 and z.shape[1] == 1 else y
        tokens = mask is not None and mask.shape[1] >= z.shape[1] > 1
        rows = rows_of_tokens(mask[:, : z.shape[1]] if tokens and mask is not None else None, len(z), z.shape[1])
        finite = z.detach().isfinite().all(2)
        return cls(z, counted.bool() & finite, rows, y)


def factor(made: Predictions, task: str) -> Tensor:
    """Rows v, (K, B, P, K): for each prediction, the Hessian of its loss is the sum of v v' over the first axis.

    Cross-entropy: sqrt(p_k) (e_k - p), p the softmax; labels that are yes or no: sqrt(p_k (1 - p_k) / t) e_k, p the sigmoid;
    numbers: sqrt(2 / t) e_k; t the number of a sample's outputs with a target.
    """
    z = made.z.detach()
    eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)[:, None, None]
    if task in BY_VALUE:
        return eye * _spread(made, task)
    p = z.softmax(-1)
    return p.movedim(-1, 0).sqrt()[..., None] * (eye - p)


def drawn(made: Predictions, task: str, batch: Batch, number: int, seed: int) -> Tensor:
    """A random v, (B, P, K), whose v v' has the Hessian as its mean: the slope of the loss for labels drawn from the model."""
    z = made.z.detach()
    if task in BY_VALUE:
        random = signs(batch.hashes, made.rows, z.shape[-1], range(number, number + 1), seed, "curvature", z)[0]
        return random * _spread(made, task)
    p = z.double().softmax(-1)
    u = uniforms(batch.hashes, made.rows, number, seed, "curvature").to(z.device)
    label = torch.searchsorted(p.cumsum(-1), u[..., None], right=True).clamp_max(z.shape[-1] - 1)
    return (p - torch.zeros_like(p).scatter(-1, label, 1.0)).to(z)


def _spread(made: Predictions, task: str) -> Tensor:
    """The root of each output's own second derivative, (B, P, K); 0 for an output without a target."""
    z = made.z.detach()
    known = torch.ones_like(z, dtype=torch.bool) if made.labels is None else which_count(made.labels, task)
    p = z.sigmoid()
    each = p * (1 - p) if task == "multilabel" else torch.full_like(z, 2.0)
    return (each.where(known, 0) / known.sum(-1, keepdim=True).clamp_min(1)).sqrt()
