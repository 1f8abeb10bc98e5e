"""How well a classifier does: accuracy, loss and calibration, by torchmetrics."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from .frame import Frame, logits_of
from .measure import device_of
from .modes import frozen


def evaluate(model: nn.Module, data: Iterable[Any]) -> dict[str, float]:
    """accuracy (share), loss (cross-entropy a sample, nats), ece (15 bins, l1), samples; over processes where there are several.

    Raises ValueError for data without labels or without a sample.
    """
    device, measures = device_of(model), None
    with frozen(model), torch.no_grad():
        for batch in data:
            frame = Frame.of(batch).to(device)
            if frame.labels is None:
                raise ValueError("accuracy needs labels: give (x, y) batches")
            logits = logits_of(frame.run(model)).float()
            measures = measures or _measures(logits.shape[-1], device)
            accuracy, ece, loss, count = measures
            accuracy.update(logits, frame.labels)
            ece.update(logits.softmax(-1), frame.labels)
            loss.update(nn.functional.cross_entropy(logits, frame.labels, reduction="none"))
            count += len(frame)
    if measures is None:
        raise ValueError("the data are empty: nothing to evaluate")
    accuracy, ece, loss, count = measures
    return {"accuracy": float(accuracy.compute()), "loss": float(loss.compute()), "ece": float(ece.compute()), "samples": int(count)}


def _measures(classes: int, device: torch.device) -> tuple[Any, ...]:
    accuracy = MulticlassAccuracy(classes, average="micro")
    ece = MulticlassCalibrationError(classes, n_bins=15)
    return accuracy.to(device), ece.to(device), MeanMetric().to(device), torch.zeros((), dtype=torch.int64)
