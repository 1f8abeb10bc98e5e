"""How well a classifier does: accuracy, loss and calibration, from sums that add over batches and processes."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import reduce_tensor
from .frame import Frame, logits_of
from .measure import device_of
from .modes import frozen

_BINS = 15


def evaluate(model: nn.Module, data: Iterable[Any]) -> dict[str, float]:
    """Accuracy (share), loss (cross-entropy a sample, nats), ece (15 equal bins, l1) and samples, over all processes.

    Raises ValueError for data without labels or without a sample.
    """
    device = device_of(model)
    bins = torch.zeros(3, _BINS, dtype=torch.float64)  # samples, right answers, confidence
    loss = torch.zeros(1, dtype=torch.float64)
    with frozen(model), torch.no_grad():
        for batch in data:
            frame = Frame.of(batch).to(device)
            if frame.labels is None:
                raise ValueError("accuracy needs labels: give (x, y) batches")
            logits, labels = logits_of(frame.run(model)).float().cpu().double(), frame.labels.cpu()
            loss += nn.functional.cross_entropy(logits, labels, reduction="sum")
            bins += _binned(logits, labels)
    bins, loss = reduce_tensor(bins.to(device)).cpu(), reduce_tensor(loss.to(device)).cpu()
    samples, right, confidence = bins
    n = float(samples.sum())
    if not n:
        raise ValueError("the data are empty: nothing to evaluate")
    ece = float((right - confidence).abs().sum()) / n
    return {"accuracy": float(right.sum()) / n, "loss": float(loss) / n, "ece": ece, "samples": int(n)}


def _binned(logits: Tensor, labels: Tensor) -> Tensor:
    confidence, answer = logits.softmax(-1).max(-1)
    place = (torch.bucketize(confidence, torch.linspace(0, 1, _BINS + 1, dtype=torch.float64), right=True) - 1).clamp_max(_BINS - 1)
    rows = torch.stack([torch.ones_like(confidence), (answer == labels).double(), confidence])
    return torch.zeros(3, _BINS, dtype=torch.float64).index_add_(1, place, rows)
