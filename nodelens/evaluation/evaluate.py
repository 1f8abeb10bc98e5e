"""Accuracy, loss and calibration of a model, from sums over batches and processes."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.engine.driver import Driver, device_of, opened
from nodelens.network.arguments import check_arguments
from nodelens.network.batch import Batch
from nodelens.network.eval_mode import one_at_a_time
from nodelens.network.loss_scale import Loss
from nodelens.network.missing import IGNORE, which_count
from nodelens.network.objective import Objective
from nodelens.network.outputs import Output
from nodelens.network.tasks import BY_VALUE
from nodelens.statistics.processes import reduce_tensor

_BINS = 15
_EMPTY = "the data are empty: nothing to evaluate. An iterator is empty after one reading: give a loader or a list"
_CHUNK = 1 << 22  # logits in float64 at a time: 32 MB


@one_at_a_time
def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    task: str | None = None,
    output: Output = None,
    loss: Loss | None = None,
) -> dict[str, float]:
    """Scores of a model over the data of all processes: loss and samples, and accuracy where there is something to be right about.

    task, output, loss: as in ``AnalyzeOptions``

    classes:    accuracy (share), loss (cross-entropy in nats per sample), ece (15 equal bins, l1)
    multilabel: accuracy (share of labels on the right side of 0), loss (binary cross-entropy in nats, average over labels)
    regression: loss (mean squared error, average over outputs)
    none:       loss (the one given, per sample)

    With one label per token or position, accuracy, loss and ece are averages over predictions, whatever their batch or process.
    There are also tokens (number of predictions), perplexity exp(loss), the standard errors accuracy_se and loss_se over samples
    (tokens of one text are not independent), and bits_per_byte, total nats / ln 2 / bytes, if batches carry the number of bytes of
    their predicted tokens. A given ``loss`` replaces the task's, as its sum divided by the number of predictions.

    Raises ValueError for data without labels, without samples, or with nothing to predict.
    """
    check_arguments("nl.evaluate", model, data, sharded=True)
    objective, data = opened(model, data, Objective.of(model, output, task, loss))
    scores = _Classes(objective) if objective.task not in (*BY_VALUE, "none") else _Values(objective)
    Driver(model, objective).run(data, scores)
    device = device_of(model)
    return scores.scores({name: reduce_tensor(total.to(device)).cpu() for name, total in scores.sums.items()})


class _Values:
    """Sums of the loss of each sample, and of the labels that are right."""

    def __init__(self, objective: Objective):
        self.objective = objective
        self.sums = {"loss": torch.zeros(2, dtype=torch.float64), "right": torch.zeros(2, dtype=torch.float64)}

    def begin(self, batch: Batch) -> None:
        self.batch = batch

    def end(self, predictions: Tensor | None) -> None:
        assert predictions is not None
        if self.objective.task == "none":
            total, samples = self.objective.summed(predictions, self.batch.labels), len(self.batch)
            self.sums["loss"] += torch.tensor([float(total), samples], dtype=torch.float64)
            return
        z, y = self.objective.values(predictions, self.batch.labels)
        known = which_count(y, self.objective.task)
        each = self.objective.by_sample(predictions.double(), self.batch.labels)
        total = each.sum() if self.objective.loss is None else self.objective.summed(predictions, self.batch.labels)
        self.sums["loss"] += torch.stack([total.cpu().double(), known.flatten(1).any(1).sum().cpu().double()])
        right = ((z > 0) == (y > 0.5)) & known
        self.sums["right"] += torch.stack([right.sum(), known.sum()]).cpu()

    def scores(self, sums: dict[str, Tensor]) -> dict[str, float]:
        loss, samples = sums["loss"].tolist()
        if not samples:
            raise ValueError(_EMPTY)
        found = {"loss": loss / samples, "samples": int(samples)}
        right, known = sums["right"].tolist()
        return {"accuracy": right / known, **found} if self.objective.task == "multilabel" else found


class _Classes:
    """Sums of correct predictions, nats and calibration bins."""

    def __init__(self, objective: Objective):
        self.objective = objective
        shapes = {"bins": (3, _BINS), "totals": (3,), "products": (3, 3), "texts": (1,), "bytes": (1,), "given": (1,)}
        self.sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}

    def begin(self, batch: Batch) -> None:
        if batch.labels is None:
            raise ValueError("accuracy needs labels: give (x, y) batches")
        self.batch = batch

    def end(self, predictions: Tensor | None) -> None:
        assert predictions is not None
        batch, sums = self.batch, self.sums
        z, y = self.objective.predictions(predictions, batch.labels)
        bins, table = _scored(z, y)
        sums["bins"] += bins
        sums["totals"] += table.sum(0)
        sums["products"] += table.T @ table
        sums["texts"] += len(batch) * (y.ndim == 2)
        sums["bytes"] += torch.nan if batch.bytes is None else float(batch.bytes.sum())
        if self.objective.loss is not None:
            sums["given"] += float(self.objective.summed(predictions, batch.labels))

    def scores(self, sums: dict[str, Tensor]) -> dict[str, float]:
        found = _scores(sums)
        if self.objective.loss is None:
            return found
        given = float(sums["given"]) / float(sums["totals"][0])
        return {k: v for k, v in found.items() if k not in ("perplexity", "bits_per_byte", "loss_se")} | {"loss": given}


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
        raise ValueError(_EMPTY)
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
