"""Losses that are a mean over the batch: recognised by their values on parts of a batch, and scaled to a sum."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.messages import option

from .missing import IGNORE, with_label

Loss = Callable[[Tensor, Tensor | None], Tensor]
Count = Callable[[Tensor, Tensor | None], Tensor]
TOLERANCE = 1e-4  # relative; a sum and a mean over two parts differ by a factor of about two
_UNKNOWN, _SUM, _NEITHER = "unknown", "sum", "neither a sum nor a mean"


class ScaledLoss:
    """A loss of (logits, labels) as a sum over the samples of a batch, so that gradients do not depend on the batch size.

    The first batch tells what the loss is: its value for the whole batch is compared with those for two parts. A mean over samples,
    labels or predicted tokens, such as ``nn.CrossEntropyLoss()``, is multiplied by their number in each batch, with a warning. A
    loss that neither adds up nor averages, such as a contrastive one, is used as it is, with a warning.
    """

    def __init__(self, loss: Loss):
        if not callable(loss):
            raise TypeError(
                f"loss is {loss!r}; it is a function of (predictions, labels), such as torch.nn.functional.cross_entropy"
            )
        self.loss, self.scale = loss, _UNKNOWN
        self.over = ""  # what the loss is a mean over, as ``counts_of`` names it

    def __call__(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        """The loss of a batch, (). Raises ValueError for a loss that does not return one number."""
        value = self.loss(logits, labels)
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{option('loss')}= returns {found} for a batch of {len(logits)} samples: return one number, their sum"
            )
        if self.scale == _UNKNOWN:
            self._recognise(logits.detach(), labels, value.detach())
        if not self.over:
            return value
        count = counts_of(self.loss, logits, labels)[self.over](logits, labels)
        return value * count if bool(count > 0) else logits.sum() * 0  # the mean of no label is NaN

    @property
    def about(self) -> dict[str, str]:
        """The function's name, and how its value depends on the samples of a batch, for metadata."""
        return {"loss": getattr(self.loss, "__name__", type(self.loss).__name__), "loss_scale": self.scale}

    def _recognise(self, logits: Tensor, labels: Tensor | None, value: Tensor) -> None:
        """Decides from one batch; leaves the decision to a later one where every value is 0."""
        batch = _batch_and_parts(logits, labels)
        try:
            with torch.no_grad():
                whole, first, second = [value if z is logits else self.loss(z, y) for z, y in batch]
        except Exception as error:  # the user's function, which may refuse another number of samples in any way
            self._as_given(f"it cannot be computed for a part of the batch: {type(error).__name__}")
            return
        parts, precision = first + second, max(TOLERANCE, 8 * torch.finfo(value.dtype).eps)
        size = precision * float(whole.abs() + first.abs() + second.abs())
        if size == 0:
            return
        fits = {
            name: count
            for name, count in counts_of(self.loss, logits, labels).items()
            if bool(_averages(whole, (first, second), [count(z, y) for z, y in batch]) <= precision)
        }
        if float((whole - parts).abs()) <= size:
            self.scale = _SUM
        elif fits:
            name = self._most_likely(fits, logits, labels)
            self.scale, self.over = f"mean over {name}, multiplied by their number", name
            _warn(
                f"{option('loss')}= is a mean over the {name} of a batch: it is multiplied by their number, so that scores do not "
                "depend on the batch size; give a loss that sums (reduction='sum') to leave it as it is"
            )
        else:
            self._as_given(f"{float(whole):.4g} for the first batch, {float(first):.4g} and {float(second):.4g} for its parts")

    def _as_given(self, why: str) -> None:
        self.scale = _NEITHER
        _warn(
            f"{option('loss')}= neither adds up nor averages over samples ({why}): it is used as it is, and scores of gradients "
            "depend on how the data are divided into batches; give a loss that sums over samples, if there is one"
        )

    def _most_likely(self, fits: dict[str, Count], logits: Tensor, labels: Tensor | None) -> str:
        """Of several counts in proportion to each other, that of the logits with a gradient; the first if none is."""
        if len(fits) > 1 and logits.ndim == 3:
            with torch.enable_grad():
                z = logits.detach().requires_grad_()
                total = self.loss(z, labels)
                (slope,) = torch.autograd.grad(total, z) if total.requires_grad else [torch.zeros_like(z)]
            classes = -1 if labels is None or z.shape[:2] == labels.shape else 1
            reached = int((slope != 0).any(classes).sum())
            return next((name for name, count in fits.items() if int(count(logits, labels)) == reached), next(iter(fits)))
        return next(iter(fits))


def as_sum(loss: Loss) -> ScaledLoss:
    """A loss as a sum over the samples of a batch."""
    return loss if isinstance(loss, ScaledLoss) else ScaledLoss(loss)


def counts_of(loss: Any, logits: Tensor, labels: Tensor | None) -> dict[str, Count]:
    """What a loss may be a mean over, by name: functions of (logits, labels) that count it in a batch."""
    found: dict[str, Count] = {}
    ignore, weight = getattr(loss, "ignore_index", IGNORE), getattr(loss, "weight", None)

    def valid(y: Any) -> Tensor:
        return ~y.isnan() if y.is_floating_point() else y != ignore

    if labels is not None:
        classes = not labels.is_floating_point()
        if classes and isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) and weight is not None:
            found["class weights"] = lambda z, y: weight[y[valid(y)]].sum()  # type: ignore[index]
        if classes and logits.ndim == 3 and labels.ndim == 2:
            found["predicted tokens"] = lambda z, y: valid(y[:, 1:]).sum()  # type: ignore[index]
        found["labels"] = lambda z, y: valid(y).sum()
    return found | {"samples": lambda z, y: torch.tensor(len(z), device=z.device)}


def _batch_and_parts(logits: Tensor, labels: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    """A batch, and two parts of unequal size; a single sample is taken twice. Samples without a label are left out."""
    known = with_label(labels)
    if known is not None and labels is not None:
        logits, labels = logits[known.to(logits.device)], labels[known]
    if len(logits) < 2:
        twice = torch.cat([logits, logits]), None if labels is None else torch.cat([labels, labels])
        return [twice, (logits, labels), (logits, labels)]
    at = max(1, len(logits) // 3)
    parts = ((logits[part], None if labels is None else labels[part]) for part in (slice(at), slice(at, None)))
    return [(logits, labels), *parts]


def _averages(whole: Tensor, parts: tuple[Tensor, Tensor], counts: list[Tensor]) -> Tensor:
    """How far a value is from the mean of its parts with these weights, relative to their size; infinite without weights."""
    every, first, second = (count.to(whole).double() for count in counts)
    mean = (first * parts[0].double() + second * parts[1].double()) / every
    size = whole.double().abs() + mean.abs()
    return ((whole.double() - mean).abs() / size).nan_to_num(torch.inf)


def _warn(line: str) -> None:
    warnings.warn(line, UserWarning, stacklevel=4)
