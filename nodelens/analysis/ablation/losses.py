"""The loss of each sample of a batch, for any task."""

import torch
from torch import Tensor
from torch.nn import functional

from nodelens.network.batch import Batch
from nodelens.network.missing import IGNORE, which_count
from nodelens.network.objective import Objective
from nodelens.network.tasks import BY_VALUE

_CHUNK = 1 << 22  # logits at a time: 16 MB in float32


def loss_by_sample(objective: Objective, z: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed loss of each sample and its number of predictions, both (B,) float64 on the CPU.

    Cross-entropy in nats; for regression and multilabel the sample's mean over its outputs, one prediction per sample with a
    target; a loss that the user gives is called for each sample alone. Raises ValueError as ``Objective.predictions`` does.
    """
    labels = batch.labels
    if objective.loss is not None:
        rows = [objective.summed(z[k : k + 1], None if labels is None else labels[k : k + 1]) for k in range(len(batch))]
        return torch.stack([row.detach().double().cpu().reshape(()) for row in rows]), batch.predicted.double().cpu()
    if objective.task in BY_VALUE:
        _, y = objective.values(z, labels)
        known = which_count(y, objective.task).flatten(1).any(1)
        wide = z if z.itemsize >= 4 else z.float()
        return objective.by_sample(wide, labels).double().cpu(), known.double().cpu()
    return cross_entropy_sums(*objective.predictions(z, labels))


def cross_entropy_sums(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over the predictions of each sample, and their number, both (B,) float64 on the CPU.

    Shapes: z (B, ..., K) logits; y (B, ...) the labels they predict, IGNORE for those that do not count
    """
    flat, labels = z.reshape(-1, z.shape[-1]), y.reshape(-1)
    size = max(1, _CHUNK // z.shape[-1])
    parts = [
        functional.cross_entropy(rows if rows.itemsize >= 4 else rows.float(), each, ignore_index=IGNORE, reduction="none")
        for rows, each in zip(flat.split(size), labels.split(size), strict=True)
    ]
    nats = torch.cat(parts) if parts else flat.new_zeros(0)
    by_sample = nats.double().reshape(len(y), -1).sum(1) if len(y) else nats.double()
    return by_sample.cpu(), (y != IGNORE).reshape(len(y), -1).sum(1).double().cpu()
