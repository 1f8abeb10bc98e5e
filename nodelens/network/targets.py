"""Paired targets, one per sample or per token: the label, or a scalar computed from the logits."""

from collections.abc import Callable, Collection
from importlib import import_module

import torch
from torch import Tensor, nn

from nodelens.messages import option

from .missing import IGNORE, with_label, with_target
from .objective import Objective
from .tasks import BY_VALUE

NAMES = ("label", "logit_margin", "correct_logit", "logits", "logit_pc1", "nll", "loss", "given", "auto")
TOKEN_CLASSES = 1024  # largest vocabulary whose tokens serve as classes, or whose logits as a target, of each token
_CHUNK = 1 << 22  # logits converted to float64 at once: 32 MB
_CLASSES, _NEXT_TOKENS = Objective("classification"), Objective("causal_lm")


def resolve_auto(name: str | Callable[..., Tensor], tokens: bool, classes: bool = True) -> str | Callable[..., Tensor]:
    """The target with ``auto`` replaced: nll if each token has logits, otherwise logit_margin, or loss if there are no classes."""
    if not isinstance(name, str) or "." in name:
        return name
    default = "nll" if tokens else "logit_margin" if classes else "loss"
    return "+".join(default if part == "auto" else part for part in name.split("+"))


def is_per_token(name: str | Callable[..., Tensor] | None, per_token: Collection[str]) -> bool:
    """Whether a target has one value per token if the logits do: all but labels and given targets with one per sample."""
    parts = name.split("+") if isinstance(name, str) else [name]
    return any(part is not None and (part not in ("label", "given") or part in per_token) for part in parts)


def check_token_target(metric: str, name: str | Callable[..., Tensor] | None, classes: int, per_token: Collection[str]) -> None:
    """Raises ValueError for a target that rows of tokens cannot have, given the vocabulary size ``classes``."""
    parts = name.split("+") if isinstance(name, str) else []
    of_logits, of_class = "logits" in parts, "label" in parts and "label" in per_token
    if classes > TOKEN_CLASSES and (of_logits or of_class):
        raise ValueError(
            f"metric {metric!r} needs {'all logits' if of_logits else 'a class'} for each row; here the rows are tokens with a "
            f"vocabulary of {classes:,}, more than {TOKEN_CLASSES:,}: leave the metric out, use target nll (mi, synergy), or "
            f"give one class label per sample, and a {option('loss')}= for them"
        )
    if len({is_per_token(part, per_token) for part in parts}) > 1:
        raise ValueError(
            f"metric {metric!r} pairs each row with {' and '.join(parts)}; here one is per sample, the other per token: give both "
            "alike, or leave the metric out"
        )


def target_of(
    name: str | Callable[..., Tensor],
    logits: Tensor | None,
    labels: Tensor | None,
    given: Tensor | None = None,
    objective: Objective = _CLASSES,
) -> Tensor:
    """One target per sample, (B,) or (B, t), from ``logits`` (B, K); NaN for a sample without a label.

    label, logit_margin z_y - max_{k != y} z_k, correct_logit z_y, logits, nll or loss (of the objective's task), given, auto (the
    margin; the loss for tasks without classes); or a function of (logits, labels), or its dotted name. Names joined by + give one
    column each. Raises ValueError if logits, labels or given targets are missing, a function returns another shape, or the task
    has no classes.
    """
    name = resolve_auto(name, tokens=False, classes=objective.task not in BY_VALUE)
    if callable(name) or "." in name:
        return _user_target(name, logits, labels)
    if "+" in name:
        parts = [(part, target_of(part, logits, labels, given, objective)) for part in name.split("+")]
        columns = [t.double().where(with_target(part, t), torch.nan) if t.ndim == 1 else t.double() for part, t in parts]
        return torch.cat([column.reshape(len(column), -1) for column in columns], 1)
    if name == "given":
        return _require(name, "a target in the batch", given)
    if name == "label":
        return _require(name, "labels", labels)
    if name not in NAMES or name == "logit_pc1":  # a principal axis over all samples
        raise ValueError(f"no target is called {name!r}; choose from {', '.join(n for n in NAMES if n != 'logit_pc1')}")
    z = _require(name, "logits", logits)
    if objective.task in BY_VALUE:
        return _value_target(name, z, _require(name, "labels", labels), objective)
    if z.ndim != 2:
        raise ValueError(f"target {name!r} needs logits (samples, classes), but the model gives {tuple(z.shape)}")
    return z.double() if name == "logits" else _label_target(name, z, _require(name, "labels", labels))


def _value_target(name: str, z: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    """A target of a task without classes: its loss, or all outputs."""
    if name not in ("nll", "loss", "logits"):
        raise ValueError(f"target {name!r} is of classes, and task {objective.task} has none: choose loss, logits, label or given")
    if name == "logits":
        return z.double().flatten(1)
    value, known = objective.by_sample(z.double(), labels), with_label(labels, objective.task)
    return value if known is None else value.where(known, torch.nan)


def token_target(
    name: str | Callable[..., Tensor],
    logits: Tensor,
    labels: Tensor | None,
    given: Tensor | None = None,
    objective: Objective = _NEXT_TOKENS,
) -> Tensor:
    """Targets of each token, (B, T, t) float64, from ``logits`` (B, T, V); NaN for a token without a target.

    Targets of a label are label (its id), logit_margin, correct_logit, and nll or loss, -ln p. For a causal language model it is
    the next token's, and the last token has none. logits, given and the result of a function of (logits, labels (B, T)), (B, T) or
    (B, T, t), belong to the token itself. Raises ValueError if logits, labels or given targets are missing, or are not one per
    token.
    """
    if logits.ndim != 3:
        raise ValueError(f"target {name!r} of a token needs logits (B, T, V), but the model gives {tuple(logits.shape)}")
    name = resolve_auto(name, tokens=True)
    if isinstance(name, str) and "+" in name:
        return torch.cat([token_target(part, logits, labels, given, objective) for part in name.split("+")], 2)
    if callable(name) or "." in name:
        value = _user_target(name, logits, labels, "tokens")
    elif name in ("given", "logits"):
        value = logits if name == "logits" else _require(name, "a target in the batch", given)
    elif name in NAMES and name != "logit_pc1":
        value = _predicted_target(name, logits, _require(name, "labels", labels), objective)
    else:
        raise ValueError(f"no target is called {name!r}; choose from {', '.join(n for n in NAMES if n != 'logit_pc1')}")
    if value.shape[:2] != logits.shape[:2] or value.ndim not in (2, 3):
        raise ValueError(
            f"target {name!r} is {tuple(value.shape)}, but {logits.shape[1]} tokens of {len(logits)} samples have logits: "
            "give one value per token, (B, T) or (B, T, t)"
        )
    return (value[:, :, None] if value.ndim == 2 else value).double()


def _predicted_target(name: str, logits: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    """A target of the label that each token predicts, (B, T) float64, computed in chunks to save memory."""
    z, y = objective.predictions(logits, labels)
    value = torch.full(logits.shape[:2], torch.nan, dtype=torch.float64, device=logits.device)
    for place in (y != IGNORE).nonzero().split(max(1, _CHUNK // z.shape[-1])):
        at = place.unbind(1)
        value[at] = y[at].double() if name == "label" else _label_target(name, z[at], y[at])
    return value


def _label_target(name: str, z: Tensor, y: Tensor) -> Tensor:
    if y.is_floating_point() or y.ndim > 1:
        shape = f"{tuple(y.shape)} {str(y.dtype).removeprefix('torch.')}"
        raise ValueError(
            f"target {name!r} needs one integer class per row, not {shape}: give {option('task')}=regression or "
            f"{option('task')}=multilabel"
        )
    known = (y >= 0) & (y < z.shape[1])
    if bool((y >= z.shape[1]).any()):
        raise ValueError(f"target {name!r}: the model has {z.shape[1]} classes, but a label is {int(y.max())}")
    own = y.where(known, 0)[:, None]
    correct = z.gather(1, own)[:, 0].double()
    if name in ("loss", "nll"):
        value = nn.functional.cross_entropy(z.double(), own[:, 0], reduction="none")
    elif name == "correct_logit":
        value = correct
    else:
        value = correct - z.scatter(1, own, -torch.inf).amax(1).double()
    return value.where(known, torch.nan)


def _user_target(name: str | Callable[..., Tensor], logits: Tensor | None, labels: Tensor | None, rows: str = "samples") -> Tensor:
    """A target computed by a function of the user, one per sample or one per token."""
    if isinstance(name, str):
        home, _, attribute = name.rpartition(".")
        function = getattr(import_module(home), attribute, None)
        if not callable(function):
            raise ValueError(f"target {name!r}: {home} has no function {attribute!r}")
    else:
        function = name
    z = _require(str(name), "logits", logits)
    value = function(z, labels)
    axes = 1 if rows == "samples" else 2
    if not isinstance(value, Tensor) or value.ndim not in (axes, axes + 1) or value.shape[:axes] != z.shape[:axes]:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        wanted = "(samples,) or (samples, t)" if axes == 1 else "(B, T) or (B, T, t)"
        raise ValueError(f"target {name!r} returns {shape} for {' x '.join(map(str, z.shape[:axes]))} {rows}; return {wanted}")
    return value.detach()


def logit_pc1(logits: Tensor) -> Tensor:
    """Centred logits (n, K) projected on their first principal axis, (n,); the sign is arbitrary."""
    centred = logits.double() - logits.double().mean(0)
    return centred @ torch.linalg.svd(centred, full_matrices=False).Vh[0]


def _require(name: str, what: str, value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError(f"target {name!r} needs {what}, but the data have none: give (x, y) batches, or choose another metric")
    return value
