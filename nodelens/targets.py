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


def summed_loss(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Cross-entropy summed over valid labels: of (B, K) with (B,), or of (B, T, V) with (B, T) (the next token's)."""
    y = _need("loss", "labels", labels)
    if logits.ndim == 3 and y.ndim == 2:
        logits, y = logits[:, :-1].flatten(0, 1), y[:, 1:].flatten()
    if logits.ndim != 2 or y.ndim != 1 or y.is_floating_point():
        raise ValueError(
            f"cross-entropy wants logits (B, K) and class labels (B,), not {tuple(logits.shape)} and "
            f"{tuple(y.shape)} {y.dtype}; give loss=, a function of (logits, labels) that sums over the batch"
        )
    valid = y[y != IGNORE]
    if len(valid) and (int(valid.max()) >= logits.shape[1] or int(valid.min()) < 0):
        raise ValueError(f"the model has {logits.shape[1]} classes, the labels run from {int(valid.min())} to {int(valid.max())}")
    return nn.functional.cross_entropy(logits, y, ignore_index=IGNORE, reduction="sum")


def _need(name: str, what: str, value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError(f"target {name!r} needs {what}, the data have none: give (x, y) batches, or choose another metric")
    return value
