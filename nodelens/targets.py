"""What stands beside the rows of a sample: its label, or a number made of its logits; and the loss."""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor, nn

IGNORE = -100  # a label that does not count, as in cross_entropy


NAMES = ("label", "logit_margin", "correct_logit", "logits", "logit_pc1", "loss", "given")


def target_of(
    name: str | Callable[..., Tensor], logits: Tensor | None, labels: Tensor | None, given: Tensor | None = None
) -> Tensor:
    """One target a sample: (B,) or (B, t), of ``logits`` (B, K). NaN where a sample has no label.

    label, logit_margin z_y - max_{k != y} z_k, correct_logit z_y, logits, loss (cross-entropy), given; a function of
    (logits, labels), or its dotted name; several names joined by + are columns side by side.
    Raises ValueError when what it is made of is missing, or a function gives another shape.
    """
    if callable(name) or "." in name:
        return _own(name, logits, labels)
    if "+" in name:
        parts = [target_of(part, logits, labels, given) for part in name.split("+")]
        return torch.cat([p.double().reshape(len(p), -1) for p in parts], 1)
    if name == "given":
        return _need(name, "a target in the batch", given)
    if name == "label":
        return _need(name, "labels", labels)
    if name not in NAMES or name == "logit_pc1":  # which is an axis of all samples' logits
        raise ValueError(f"no target is called {name!r}; there are {', '.join(n for n in NAMES if n != 'logit_pc1')}")
    z = _need(name, "logits", logits)
    if z.ndim != 2:
        raise ValueError(f"target {name!r} wants logits (samples, classes), the model gives {tuple(z.shape)}")
    return z.double() if name == "logits" else _of_label(name, z, _need(name, "labels", labels))


def _of_label(name: str, z: Tensor, y: Tensor) -> Tensor:
    known = (y >= 0) & (y < z.shape[1])
    if bool((y >= z.shape[1]).any()):
        raise ValueError(f"target {name!r}: the model has {z.shape[1]} classes, a label is {int(y.max())}")
    own = y.where(known, 0)[:, None]
    correct = z.gather(1, own)[:, 0].double()
    if name == "loss":
        value = nn.functional.cross_entropy(z.double(), own[:, 0], reduction="none")
    elif name == "correct_logit":
        value = correct
    else:
        value = correct - z.scatter(1, own, -torch.inf).amax(1).double()
    return value.where(known, torch.nan)


def _own(name: str | Callable[..., Tensor], logits: Tensor | None, labels: Tensor | None) -> Tensor:
    """A target of the user's own."""
    if isinstance(name, str):
        home, _, attribute = name.rpartition(".")
        function = getattr(import_module(home), attribute, None)
        if not callable(function):
            raise ValueError(f"target {name!r}: {home} has no function {attribute!r}")
    else:
        function = name
    z = _need(str(name), "logits", logits)
    value = function(z, labels)
    if not isinstance(value, Tensor) or value.ndim not in (1, 2) or len(value) != len(z):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"target {name!r} gives {shape} for {len(z)} samples; it gives (samples,) or (samples, t)")
    return value.detach()


def logit_pc1(logits: Tensor) -> Tensor:
    """Centred logits (n, K) on their first principal axis, (n,). It has no sign of its own."""
    centred = logits.double() - logits.double().mean(0)
    return centred @ torch.linalg.svd(centred, full_matrices=False).Vh[0]


def predictions(logits: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits (..., K) and the labels (...) that they predict, IGNORE where a label does not count.

    Of (B, K) with (B,) these themselves; of (B, T, V) with (B, T) the logits at each token and the next one's label.
    Raises ValueError for other shapes, and for labels that the model does not have.
    """
    y = _need("loss", "labels", labels)
    if logits.ndim == 3 and y.ndim == 2:
        logits, y = logits[:, :-1], y[:, 1:]
    if logits.shape[:-1] != y.shape or logits.ndim not in (2, 3) or y.is_floating_point():
        raise ValueError(
            f"cross-entropy wants logits (B, K) and class labels (B,), not {tuple(logits.shape)} and "
            f"{tuple(y.shape)} {y.dtype}; give loss=, a function of (logits, labels) that sums over the batch"
        )
    valid = y[y != IGNORE]
    if len(valid) and (int(valid.max()) >= logits.shape[-1] or int(valid.min()) < 0):
        raise ValueError(f"the model has {logits.shape[-1]} classes, the labels run from {int(valid.min())} to {int(valid.max())}")
    return logits, y


def summed_loss(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Cross-entropy summed over labels that count: of (B, K) with (B,), or of (B, T, V) with (B, T) (the next token's)."""
    z, y = predictions(logits, labels)
    return nn.functional.cross_entropy(z.flatten(0, -2), y.flatten(), ignore_index=IGNORE, reduction="sum")


def _need(name: str, what: str, value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError(f"target {name!r} needs {what}, the data have none: give (x, y) batches, or choose another metric")
    return value
