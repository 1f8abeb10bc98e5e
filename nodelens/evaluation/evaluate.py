"""How well a classifier or a language model does, from sums that add over batches and processes."""

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
_CHUNK = 1 << 22  # logits that are in float64 at once: 32 MB


def evaluate(model: nn.Module, data: Iterable[Any]) -> dict[str, float]:
    """Accuracy (share), loss (cross-entropy a sample, nats), ece (15 equal bins, l1) and samples, over all processes.

    With a label a token every prediction of a next token counts alike, whichever batch or process it came in: accuracy, loss and
    ece are over tokens, and there are tokens (predicted ones), perplexity exp(loss), the standard errors accuracy_se and loss_se
    over samples (tokens of one text are not independent) and, where batches carry the bytes that their predicted tokens stand
    for, bits_per_byte, total nats / ln 2 / bytes.

    Raises ValueError for data without labels, without a sample, or with nothing to predict.
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
    """Bins of confidence (predictions, right ones, confidence; 3, bins) and a table (samples, 3): predictions, right ones, nats."""
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
    """What the sums of all processes say."""
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
    if sums["bytes"] > 0:  # NaN where a batch did not say
        score["bits_per_byte"] = nats / float(torch.tensor(2.0, dtype=torch.float64).log()) / float(sums["bytes"])
    return score


def _error(products: Tensor, ratio: float, n: float) -> float:
    """Standard error of a ratio of sums over samples, of the samples' products: that of its linear form in them."""
    direction = torch.tensor([-ratio, 1.0], dtype=torch.float64)
    return float((direction @ products @ direction).clamp_min(0).sqrt()) / n
