"""What stands beside the rows of a sample, or of a token: its label, or a number made of its logits; and the loss."""

from collections.abc import Callable, Collection
from importlib import import_module

import torch
from torch import Tensor, nn

IGNORE = -100  # a label that does not count, as in cross_entropy
NAMES = ("label", "logit_margin", "correct_logit", "logits", "logit_pc1", "nll", "loss", "given", "auto")
TOKEN_CLASSES = 1024  # tokens of a vocabulary that can stand as classes, or their logits as a target, beside each token
_CHUNK = 1 << 22  # logits that are in float64 at once: 32 MB


def settled(name: str | Callable[..., Tensor], tokens: bool) -> str | Callable[..., Tensor]:
    """A target with ``auto`` in words: nll where each token has logits of its own, else logit_margin."""
    if not isinstance(name, str) or "." in name:
        return name
    return "+".join(("nll" if tokens else "logit_margin") if part == "auto" else part for part in name.split("+"))


def of_tokens(name: str | Callable[..., Tensor] | None, per_token: Collection[str]) -> bool:
    """Whether a target is one a token where each has logits: all are but labels and given ones that are one a sample."""
    parts = name.split("+") if isinstance(name, str) else [name]
    return any(part is not None and (part not in ("label", "given") or part in per_token) for part in parts)


def check_token_target(metric: str, name: str | Callable[..., Tensor] | None, classes: int, per_token: Collection[str]) -> None:
    """Raises ValueError, with the metric's name and the way out, for a target that tokens of so many kinds cannot have."""
    parts = name.split("+") if isinstance(name, str) else []
    of_logits, of_class = "logits" in parts, "label" in parts and "label" in per_token
    if classes > TOKEN_CLASSES and (of_logits or of_class):
        raise ValueError(
            f"metric {metric!r} reads {'all logits' if of_logits else 'a class'} of each row; here the rows are tokens, of "
            f"{classes:,} kinds, more than {TOKEN_CLASSES:,}: leave the metric out, take one with target nll (mi, synergy), or "
            "give labels of classes, one a sample, and a loss= of them"
        )
    if len({of_tokens(part, per_token) for part in parts}) > 1:
        raise ValueError(
            f"metric {metric!r} reads {' and '.join(parts)} beside each row; here one is a sample's, one a token's: give both "
            "alike, or leave the metric out"
        )


def target_of(
    name: str | Callable[..., Tensor], logits: Tensor | None, labels: Tensor | None, given: Tensor | None = None
) -> Tensor:
    """One target a sample: (B,) or (B, t), of ``logits`` (B, K). NaN where a sample has no label.

    label, logit_margin z_y - max_{k != y} z_k, correct_logit z_y, logits, nll or loss (cross-entropy), given, auto (the
    margin); a function of (logits, labels), or its dotted name; several names joined by + are columns side by side.
    Raises ValueError when what it is made of is missing, or a function gives another shape.
    """
    name = settled(name, tokens=False)
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


def token_target(name: str | Callable[..., Tensor], logits: Tensor, labels: Tensor | None, given: Tensor | None = None) -> Tensor:
    """Targets of each token, (B, T, t) float64, of ``logits`` (B, T, V); NaN where a token has none.

    Of the label they are about the next token: label (its id), logit_margin, correct_logit, and nll or loss, -ln p; a last token
    has none. logits and given are a token's own, and so is what a function makes of (logits, labels (B, T)), (B, T) or (B, T, t).
    Raises ValueError when what a target is made of is missing, or not one a token.
    """
    if logits.ndim != 3:
        raise ValueError(f"target {name!r} of a token wants logits (B, T, V), the model gives {tuple(logits.shape)}")
    name = settled(name, tokens=True)
    if isinstance(name, str) and "+" in name:
        return torch.cat([token_target(part, logits, labels, given) for part in name.split("+")], 2)
    if callable(name) or "." in name:
        value = _own(name, logits, labels, "tokens")
    elif name in ("given", "logits"):
        value = logits if name == "logits" else _need(name, "a target in the batch", given)
    elif name in NAMES and name != "logit_pc1":
        value = _of_next(name, logits, _need(name, "labels", labels))
    else:
        raise ValueError(f"no target is called {name!r}; there are {', '.join(n for n in NAMES if n != 'logit_pc1')}")
    if value.shape[:2] != logits.shape[:2] or value.ndim not in (2, 3):
        raise ValueError(
            f"target {name!r} is {tuple(value.shape)}, and {logits.shape[1]} tokens of {len(logits)} samples have logits of their "
            "own: give one a token, (B, T) or (B, T, t)"
        )
    return (value[:, :, None] if value.ndim == 2 else value).double()


def _of_next(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    """What a target says of the next token, (B, T) float64, in pieces that fit in memory."""
    z, y = predictions(logits, labels)
    value = torch.full(logits.shape[:2], torch.nan, dtype=torch.float64, device=logits.device)
    for place in (y != IGNORE).nonzero().split(max(1, _CHUNK // z.shape[-1])):
        at = place.unbind(1)
        value[at] = y[at].double() if name == "label" else _of_label(name, z[at], y[at])
    return value


def _of_label(name: str, z: Tensor, y: Tensor) -> Tensor:
    known = (y >= 0) & (y < z.shape[1])
    if bool((y >= z.shape[1]).any()):
        raise ValueError(f"target {name!r}: the model has {z.shape[1]} classes, a label is {int(y.max())}")
    own = y.where(known, 0)[:, None]
    correct = z.gather(1, own)[:, 0].double()
    if name in ("loss", "nll"):
        value = nn.functional.cross_entropy(z.double(), own[:, 0], reduction="none")
    elif name == "correct_logit":
        value = correct
    else:
        value = correct - z.scatter(1, own, -torch.inf).amax(1).double()
    return value.where(known, torch.nan)


def _own(name: str | Callable[..., Tensor], logits: Tensor | None, labels: Tensor | None, rows: str = "samples") -> Tensor:
    """A target of the user's own, one a sample or one a token."""
    if isinstance(name, str):
        home, _, attribute = name.rpartition(".")
        function = getattr(import_module(home), attribute, None)
        if not callable(function):
            raise ValueError(f"target {name!r}: {home} has no function {attribute!r}")
    else:
        function = name
    z = _need(str(name), "logits", logits)
    value = function(z, labels)
    axes = 1 if rows == "samples" else 2
    if not isinstance(value, Tensor) or value.ndim not in (axes, axes + 1) or value.shape[:axes] != z.shape[:axes]:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        wanted = "(samples,) or (samples, t)" if axes == 1 else "(B, T) or (B, T, t)"
        raise ValueError(f"target {name!r} gives {shape} for {' x '.join(map(str, z.shape[:axes]))} {rows}; it gives {wanted}")
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
