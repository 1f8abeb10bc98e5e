"""Accuracy, loss and calibration of a classifier or language model, from sums over batches and processes."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.engine.analyze import device_of
from nodelens.network.batch import Batch, logits_of
from nodelens.network.eval_mode import eval_mode
from nodelens.network.targets import IGNORE, predictions
from nodelens.statistics.processes import reduce_tensor

_BINS = 15
_CHUNK = 1 << 22  # logits in float64 at a time: 32 MB


def evaluate(model: nn.Module, data: Iterable[Any]) -> dict[str, float]:
    """Accuracy (share), loss (cross-entropy in nats per sample), ece (15 equal bins, l1) and samples, over all processes.

    With one label per token, accuracy, loss and ece are averages over predicted tokens, whatever their batch or process. There are
    also tokens (number of predicted tokens), perplexity exp(loss), the standard errors accuracy_se and loss_se over samples
    (tokens of one text are not independent), and bits_per_byte, total nats / ln 2 / bytes, if batches carry the number of bytes of
    their predicted tokens.

    Raises ValueError for data without labels, without samples, or with nothing to predict.
    """
    device = device_of(model)
    sums = {"bins": (3, _BINS), "totals": (3,), "products": (3, 3), "texts": (1,), "bytes": (1,)}
    found = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in sums.items()}
    with eval_mode(model), torch.no_grad():
        for batch in data:
            batch = Batch.of(batch).to(device)
            if batch.labels is None:
                raise ValueError("accuracy needs labels: give (x, y) batches")
            bins, table = _scored(*predictions(logits_of(batch.run(model)), batch.labels))
            found["bins"] += bins
            found["totals"] += table.sum(0)
            found["products"] += table.T @ table
            found["texts"] += len(batch) * (batch.labels.ndim == 2)
            found["bytes"] += torch.nan if batch.bytes is None else float(batch.bytes.sum())
    return _scores({name: reduce_tensor(sum_.to(device)).cpu() for name, sum_ in found.items()})


def _scored(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Bins of confidence, (3, bins): predictions, correct, confidence; and per sample, (samples, 3): predictions, correct, nats."""
    bins = torch.zeros(3, _BINS, dtype=torch.float64)
    table = torch.zeros(len(labels), 3, dtype=torch.float64)
    at = (labels != IGNORE).nonzero()
    for where in at.split(max(1, _CHUNK // logits.shape[-1])):
        place = where.unbind(1)
        z, y = logits[place].double(), labels[place]
        top, answer = z.max(-1)
        total = z.logsumexp(-1)
        confidence = (top - total).exp().cpu()
        right, nats = (answer == y).cpu().double(), (total - z.gather(-1, y[:, None])[:, 0]).cpu()
        ones = torch.ones_like(right)
        edges = torch.linspace(0, 1, _BINS + 1, dtype=torch.float64)
        bin_ = (torch.bucketize(confidence, edges, right=True) - 1).clamp_max(_BINS - 1)
        bins.index_add_(1, bin_, torch.stack([ones, right, confidence]))
        table.index_add_(0, where[:, 0].cpu(), torch.stack([ones, right, nats], 1))
    return bins, table


def _scores(sums: dict[str, Tensor]) -> dict[str, float]:
    """The scores from the sums of all processes."""
    n, right, nats = sums["totals"].tolist()
    if not n:
        raise ValueError("the data are empty: nothing to evaluate")
    _, hits, confidence = sums["bins"]
    ece = float((hits - confidence).abs().sum()) / n
    score = {"accuracy": right / n, "loss": nats / n, "ece": ece, "samples": int(n)}
    if not sums["texts"]:
        return score
    perplexity = float(torch.tensor(nats / n, dtype=torch.float64).exp())
    score |= {"samples": int(sums["texts"]), "tokens": int(n), "perplexity": perplexity}
    for k, name in ((1, "accuracy"), (2, "loss")):
        score[f"{name}_se"] = _error(sums["products"][[0, k]][:, [0, k]], score[name], n)
    if sums["bytes"] > 0:  # NaN if a batch has no bytes
        score["bits_per_byte"] = nats / float(torch.tensor(2.0, dtype=torch.float64).log()) / float(sums["bytes"])
    return score


def _error(products: Tensor, ratio: float, n: float) -> float:
    """Standard error of a ratio of sums over samples, by linearisation (delta method), from the product sums of the samples."""
    direction = torch.tensor([-ratio, 1.0], dtype=torch.float64)
    return float((direction @ products @ direction).clamp_min(0).sqrt()) / n
