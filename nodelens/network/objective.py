"""What a model answers: which part of its output, for which task, and the loss of that answer."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from nodelens.messages import option

from .batch import Batch
from .eval_mode import eval_mode
from .hooks import observed
from .layers import Layer
from .loss_scale import Loss, ScaledLoss, as_sum
from .missing import IGNORE, which_count
from .outputs import Output, answer_of
from .positions import Positions
from .sharded import class_name
from .streams import decoder_sites
from .tasks import (
    BY_TOKEN,
    BY_VALUE,
    TASKS,
    decoder_shift,
    is_classifier,
    is_pretrained,
    required_inputs,
    takes,
    task_of,
    unwrapped,
)


@dataclass(frozen=True)
class Objective:
    """Which part of a model's output holds its predictions, which task they answer, and their loss.

    task:    one of ``TASKS``; "" until ``settled`` has seen a batch, and after that for labels that fit several tasks
    output:  name or index of the predictions in the model's output, or a function of the output; None: see ``answer_of``
    loss:    of (predictions, labels), as a sum over the batch; None: that of the task
    classes: the axis of classes where each position has a prediction: last, second, or "" where shapes have to tell
    shift:   makes the inputs of a decoder from the labels, where the model knows how
    caches:  whether the model keeps a cache of past tokens unless it is told not to
    decoder: the sites with one row per token of the decoder, see ``decoder_sites``
    positions: makes the positions of texts padded on the left, for a model that needs them
    required: names of the inputs that the model cannot run without
    """

    task: str = ""
    output: Output = None
    loss: ScaledLoss | None = None
    classes: Literal["last", "second", ""] = ""
    shift: Callable[[Tensor], Tensor] | None = None
    decoder: frozenset[str] = frozenset()
    positions: Positions | None = None
    caches: bool = False
    model: str = "the model"
    required: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: nn.Module, output: Output = None, task: str | None = None, loss: Loss | None = None) -> "Objective":
        """From a model's class and config, unless the task is given. Raises ValueError for an unknown task."""
        if task is not None and task not in TASKS:
            raise ValueError(f"{option('task')} is {task!r}; it is {', '.join(TASKS)}")
        inner = unwrapped(model)
        found = task or task_of(inner)
        shift = decoder_shift(inner) if found == "seq2seq" else None
        classes: Any = "last" if found in BY_TOKEN and is_pretrained(inner) else ""
        total, name = None if loss is None else as_sum(loss), class_name(inner)
        on_meta = any(p.is_meta for p in model.parameters())  # without a cache transformers read the values of positions
        caches = takes(inner, "use_cache") and not on_meta
        own: dict[str, Any] = {"positions": Positions.of(inner), "caches": caches, "model": name}
        return cls(found, output, total, classes, shift, required=required_inputs(inner), **own)

    @property
    def about(self) -> dict[str, Any]:
        """The task, output and loss as plain values, for metadata."""
        output = {} if self.output is None else {"output": getattr(self.output, "__name__", str(self.output))}
        return {"task": self.task or None, **output, **({} if self.loss is None else self.loss.about)}

    def batch(self, given: Any, groups: int = 1, seed: int = 0, cuts: Tensor | None = None, hashes: Tensor | None = None) -> Batch:
        """A batch whose labels and masks are read as the task says, with the positions of texts padded on the left.

        A model that would return a cache for further tokens, which nothing reads here, is told not to. Raises ValueError as
        ``Batch.of`` does.
        """
        batch = Batch.of(given, groups, seed, cuts, self.task, self.shift, self.required, hashes)
        kwargs = batch.kwargs if self.positions is None else self.positions.added(batch.kwargs)
        kwargs = {**kwargs, "use_cache": kwargs.get("use_cache", False)} if self.caches else kwargs
        return replace(batch, kwargs=kwargs, decoder=self.decoder)

    def settled(self, model: nn.Module, given: Any) -> "Objective":
        """The objective once a batch of the data is known.

        Without a task from the model, labels that repeat the input ids make a causal language model; other integers are classes.
        Where each position has a class, the module that returns the predictions tells the axis of classes.
        """
        if self.task == "seq2seq":
            return replace(self, decoder=decoder_sites(model, self.batch(given)))
        batch = Batch.of(given, task=self.task, required=self.required, hashes=torch.empty(0, dtype=torch.int64))  # read by nothing
        y, task = batch.labels, self.task
        if y is None or (self.loss is not None and task):
            return self
        if not task and not y.is_floating_point():
            task = "causal_lm" if _repeats_inputs(batch, y) else "classification"
        elif not task and is_classifier(unwrapped(model)):
            task = "multilabel"
        found = replace(self, task=task)
        unknown = not self.classes and task in ("classification", *BY_TOKEN) and y.ndim > 1
        return replace(found, classes=classes_axis(model, found, found.batch(given))) if unknown else found

    def answer(self, output: Any) -> Tensor:
        """The predictions in a model's output. Raises ValueError as ``answer_of`` does."""
        return answer_of(output, self.output, self.model)

    def run(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's predictions for a batch."""
        return self.answer(batch.run(model))

    def aligned(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Predictions with the axis of classes last and all positions on one axis, (B, K) or (B, P, K).

        ``y``: the labels, whose shape tells the axis where ``classes`` does not. Raises ValueError if both axes fit.
        """
        if z.ndim < 3 or self.task in BY_VALUE:
            return z
        axis = self.classes
        if not axis and y is not None and y.ndim == z.ndim - 1:
            fits = [k for k, shape in (("last", z.shape[:-1]), ("second", (z.shape[0], *z.shape[2:]))) if shape == y.shape]
            if len(fits) > 1:
                raise ValueError(
                    f"{self.model} predicts {tuple(z.shape)} for labels {tuple(y.shape)}: the classes may lie on axis 1 or on the "
                    f"last axis; give {option('output')}=, a function that moves them last, such as lambda out: out.movedim(1, -1)"
                )
            axis = fits[0] if fits else ""  # type: ignore[assignment]
        if not axis and z.ndim > 3:
            return z
        return (z.movedim(1, -1) if axis == "second" else z).flatten(1, -2)

    def predictions(self, z: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits (B, K) or (B, P, K) and the labels (B,) or (B, P) that they predict; IGNORE for labels that do not count.

        A causal language model predicts the next token: its last logits and first labels are left out. Raises ValueError if labels
        are missing, are not classes, have another shape, or lie outside the model's classes.
        """
        y = self._labels(labels)
        if self.task in BY_VALUE or y.is_floating_point():
            raise ValueError(self._no_classes(z, y))
        z, given = self.aligned(z, y), y
        y = y.flatten(1) if y.ndim > 1 and z.ndim == 3 else y
        if self.task == "causal_lm" and z.ndim == 3 and y.ndim == 2:
            z, y = z[:, :-1], y[:, 1:]
        if z.shape[:-1] != y.shape:
            raise ValueError(self._no_classes(z, given))
        valid = y[y != IGNORE]
        if len(valid) and (int(valid.max()) >= z.shape[-1] or int(valid.min()) < 0):
            low, high = int(valid.min()), int(valid.max())
            raise ValueError(f"the model has {z.shape[-1]} classes, but labels run from {low} to {high}")
        return z, y

    def summed(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """The loss summed over the batch: the one given, else cross-entropy in nats over all labels that count.

        For multilabel and regression it is the sum over samples of ``by_sample``.
        """
        if self.loss is not None:
            return self.loss(z, labels)
        if self.task in BY_VALUE:
            return self.by_sample(z, labels).sum()
        logits, y = self.predictions(z, labels)
        return functional.cross_entropy(logits.flatten(0, -2), y.flatten(), ignore_index=IGNORE, reduction="sum")

    def by_sample(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """The loss of each sample of a multilabel or regression task, (B,); 0 for a sample without targets.

        Binary cross-entropy in nats, or the squared error, averaged over the sample's outputs with a target. Targets that are NaN
        or, for multilabel, -100 are missing.
        """
        z, y = self.values(z, labels)
        known = which_count(y, self.task)
        target = y.where(known, 0).to(z)
        if self.task == "multilabel":
            each = functional.binary_cross_entropy_with_logits(z, target, reduction="none")
        else:
            each = (z - target).square()
        return each.where(known, 0).flatten(1).sum(1) / known.flatten(1).sum(1).clamp_min(1)

    def values(self, z: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Predictions and targets of a multilabel or regression task, both (B, K). Raises ValueError for different shapes."""
        y = self._labels(labels)
        z, y = (t[:, None] if t.ndim == 1 else t for t in (z, y))
        if z.shape != y.shape:
            shapes = f"{tuple(z.shape)}, not {tuple(self._labels(labels).shape)}"
            raise ValueError(
                f"task {self.task} needs targets in the shape of the predictions, {shapes}: give {option('output')}= or "
                f"{option('loss')}="
            )
        return z, y

    def _labels(self, labels: Tensor | None) -> Tensor:
        if self.task == "none":
            raise ValueError(f"task is none, so there is no loss and nothing to evaluate: choose a task, or give {option('loss')}=")
        if labels is None:
            raise ValueError(f"the loss needs labels, but the data have none: give (x, y) batches, or {option('loss')}=")
        return labels

    def _no_classes(self, z: Tensor, y: Tensor) -> str:
        named = f"labels {tuple(y.shape)} {str(y.dtype).removeprefix('torch.')}"
        if self.task in BY_VALUE:
            return f"task {self.task} has no classes; {named}: choose metrics and targets that need none"
        if y.is_floating_point():
            return f"{self.model} has {named}, which are no classes: {_numbers()}"
        if y.shape == z.shape:
            return f"{self.model} has {named}, one per output, which are no classes: {_numbers()}"
        return (
            f"cross-entropy needs one class label per prediction, but {self.model} predicts {tuple(z.shape)} for {named}; "
            f"give {option('task')}=, {option('output')}= or {option('loss')}=, a function of (predictions, labels) that sums over "
            "the batch"
        )


@torch.no_grad()
def classes_axis(model: nn.Module, objective: Objective, batch: Batch) -> Literal["last", "second", ""]:
    """The axis of classes, by the module whose output the predictions are; "" if no single module returns them."""
    returned: list[tuple[Any, Tensor]] = []

    def see(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if isinstance(output, Tensor):
            returned.append((module, output))

    leaves = [module for module in model.modules() if not next(module.children(), None)]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with eval_mode(model), torch.inference_mode(False), observed(leaves, see):
        z = objective.run(model, batch.head(2).to(device))
    layer = next((Layer("", module) for module, output in reversed(returned) if output is z), None)
    if layer is None:
        return ""
    return "second" if layer.places_units_second else "last" if isinstance(layer.module, nn.Linear) else ""


def _repeats_inputs(batch: Batch, labels: Tensor) -> bool:
    """Whether every label that counts is the input id at its place."""
    ids = batch.args[0] if batch.args else batch.kwargs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.shape != labels.shape or ids.ndim != 2 or ids.is_floating_point():
        return False
    known = labels != IGNORE
    return bool(known.any()) and bool((labels == ids)[known].all())


def _numbers() -> str:
    """What to do with labels that are numbers and no classes."""
    tasks = f"give {option('task')}=regression or {option('task')}=multilabel, or {option('loss')}="
    return f"{tasks}; classes are integers (argmax(1) of one-hot rows)"
