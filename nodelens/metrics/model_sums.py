"""Sums that need the whole model: gradients of weights, and training of a copy."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nodelens.network.batch import Batch
from nodelens.network.eval_mode import copy_of, differentiable, eval_mode
from nodelens.network.group_layer import GroupLayer
from nodelens.network.groups import GroupSlice
from nodelens.network.objective import Objective
from nodelens.statistics.processes import reduce_tensor
from nodelens.statistics.rows import Rows

Unit = Literal["sequence", "token"]
LossReduction = Literal["sum", "mean"]
CHUNK = 1 << 26  # gradient entries in memory at once, 256 MB in float32
_UNFIT = (RuntimeError, NotImplementedError, ValueError, TypeError, KeyError, AttributeError)  # what a model may raise under vmap


class ModelSums:
    """Sums of one pass for the units of all groups, in float64, over all samples together and not per group of samples.

    A Need refers to it by the port ``model`` and the options of its constructor. parameters: the tensors with respect to which the
    summed loss is differentiated. rounds: how often the data are read. forward: whether the model has to run. port: the port of
    the groups whose rows are passed to ``see``, empty for none.
    """

    rounds: ClassVar[int] = 1
    forward: ClassVar[bool] = True
    parts: ClassVar[tuple[None]] = (None,)  # not kept per group of samples: no standard error

    def __init__(self, model: nn.Module, groups: Sequence[GroupLayer]):
        self.model, self.groups, self.port = model, groups, ""
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.parameters: list[Tensor] = []
        self.totals: dict[Any, Tensor] = {}
        self.reached = set[str]()  # names of the tensors that have got a gradient, be it 0

    @classmethod
    def times(cls, *options: Any) -> int:
        """How often the data are read."""
        return cls.rounds

    @classmethod
    def watches(cls, *options: Any) -> str:
        """The port of the groups whose rows are passed to ``see``; empty for none."""
        return ""

    @classmethod
    def size_of(cls, groups: Sequence[GroupLayer], *options: Any) -> int:
        """Memory of the sums, in bytes."""
        return 8 * sum(group.group.n for group in groups)

    @property
    def value(self) -> "ModelSums":
        return self

    def zeros(self, *shape: int) -> Tensor:
        """An empty sum."""
        return torch.zeros(*shape, dtype=torch.float64, device=self.device)

    def begin(self, batch: Batch) -> None:
        self.batch = batch

    def see(self, layer: GroupLayer, rows: Rows) -> None:
        """Receives rows of a group."""

    def end(self, logits: Tensor | None, objective: Objective) -> None:
        """Ends the batch, without recording a graph; logits are None where the model did not run."""

    def again(self) -> None:
        """Called before the data are read again."""

    def pieces(self, group: GroupLayer) -> list[GroupSlice]:
        """The slices of a group's weights whose gradients are read."""
        return []

    def lost(self) -> list[tuple[GroupLayer, GroupSlice]]:
        """The slices of each group whose weights have got no gradient so far, not even one of 0."""
        return [(group, piece) for group in self.groups for piece in self.pieces(group) if piece.name not in self.reached]

    def reduce(self) -> None:
        """Adds the sums of all processes; every process has to call it."""
        self.totals = {key: reduce_tensor(total) for key, total in self.totals.items()}

    def to(self, device: torch.device) -> None:
        """Moves the sums to a device."""
        self.totals = {key: total.to(device) for key, total in self.totals.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that a pass that continues needs, as plain values."""
        return {"totals": dict(self.totals), "reached": sorted(self.reached)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a saved state."""
        self.totals, self.reached = dict(state["totals"]), set(state["reached"])


class _TensorSums(ModelSums):
    """Sums over samples, in the shape of each weight tensor that produces (or produces and consumes) units."""

    def __init__(self, model: nn.Module, groups: Sequence[GroupLayer], *roles: str):
        super().__init__(model, groups)
        self.roles = roles
        slices = {piece.name: piece for group in groups for piece in group.pieces(*roles)}
        self.tensors = {name: whole(model, piece) for name, piece in slices.items()}
        self.totals = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in self.tensors.items()}
        self.totals["samples"] = self.zeros(1)

    @classmethod
    def size_of(cls, groups: Sequence[GroupLayer], *options: Any) -> int:
        slices = {piece.name: piece for group in groups for piece in group.pieces(*options)}
        return 8 * sum(whole(groups[0].module, piece).numel() for piece in slices.values())

    def begin(self, batch: Batch) -> None:
        super().begin(batch)
        self.totals["samples"] += len(batch) if batch.labelled is None else int(batch.labelled.sum())

    def pieces(self, group: GroupLayer) -> list[GroupSlice]:
        return group.pieces(*self.roles)

    def mean(self, piece: GroupSlice) -> Tensor:
        """The mean over samples with a label, in the tensor's shape."""
        return self.totals[piece.name] / self.totals["samples"].to(self.totals[piece.name].device)


class WeightGradients(_TensorSums):
    """The gradient of the loss summed over all data."""

    def __init__(self, model: nn.Module, groups: Sequence[GroupLayer], *roles: str):
        super().__init__(model, groups, *roles)
        self.parameters = list(self.tensors.values())

    def end(self, logits: Tensor | None, objective: Objective) -> None:
        for name, tensor in self.tensors.items():
            if tensor.grad is not None:
                self.totals[name] += tensor.grad
                self.reached.add(name)


class SampleGradients(_TensorSums):
    """Sums of squared per-sample gradients.

    The gradient with respect to the logits is computed for the whole batch. The rest is linear in the logits and is differentiated
    for many samples at once (``torch.func.vmap``) or, where the model does not allow that, sample by sample.
    """

    def __init__(self, model: nn.Module, groups: Sequence[GroupLayer], *roles: str):
        super().__init__(model, groups, *roles)
        self.step = max(1, CHUNK // max(1, sum(t.numel() for t in self.tensors.values())))
        self.together = self.step > 1

    def end(self, logits: Tensor | None, objective: Objective) -> None:
        assert logits is not None
        with torch.enable_grad():
            z = logits.detach().requires_grad_()
            (slope,) = torch.autograd.grad(objective.summed(z, self.batch.labels), z)
        self.slope, self.objective = slope, objective
        for first in range(0, len(self.batch), self.step):
            self._add(_part(self.batch, first, self.step), slope[first : first + self.step], objective)

    def lost(self) -> list[tuple[GroupLayer, GroupSlice]]:
        self.reached |= {name for name in self.tensors if bool(self.totals[name].any())}
        if len(self.reached) < len(self.tensors):  # vmap gives zeros both for a gradient of 0 and for none
            for gradients in self._one_by_one(self.batch, self.slope, self.objective):
                self.reached |= {name for name, found in zip(self.tensors, gradients, strict=True) if found is not None}
        return super().lost()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"together": self.together}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.together = state["together"]

    def _add(self, batch: Batch, slope: Tensor, objective: Objective) -> None:
        if self.together and len(batch) > 1:
            try:
                together = self._at_once(batch, slope, objective)
            except _UNFIT:
                self.together = False
            else:
                for name, several in together.items():
                    self.totals[name] += several.double().square().sum(0)
                return
        for gradients in self._one_by_one(batch, slope, objective):
            for name, gradient in zip(self.tensors, gradients, strict=True):
                if gradient is not None:
                    self.totals[name] += gradient.double().square()

    def _at_once(self, batch: Batch, slope: Tensor, objective: Objective) -> dict[str, Tensor]:
        """{name: gradients (samples, *shape of the tensor)}."""

        def dim(value: object) -> int | None:
            return 0 if isinstance(value, Tensor) and value.ndim and len(value) == len(batch) else None

        dims = None, tuple(map(dim, batch.args)), {k: dim(v) for k, v in batch.kwargs.items()}, 0

        def linear(tensors: dict[str, Tensor], args: tuple, kwargs: dict, slope: Tensor) -> Tensor:
            args = tuple(v if d is None else v[None] for v, d in zip(args, dims[1], strict=True))
            kwargs = {k: v if dims[2][k] is None else v[None] for k, v in kwargs.items()}
            return (objective.answer(torch.func.functional_call(self.model, tensors, args, kwargs))[0] * slope).sum()

        tensors = {name: tensor.detach() for name, tensor in self.tensors.items()}
        every = torch.func.vmap(torch.func.grad(linear), in_dims=dims)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # vmap loops over some operations: correct but slow
            return every(tensors, batch.args, batch.kwargs, slope)

    def _one_by_one(self, batch: Batch, slope: Tensor, objective: Objective) -> Iterator[Sequence[Tensor | None]]:
        tensors = list(self.tensors.values())
        for k in range(len(batch)):
            with eval_mode(self.model), differentiable(tensors), torch.enable_grad():
                total = (objective.run(self.model, _part(batch, k, 1)) * slope[k : k + 1]).sum()
                yield gradients_of(total, tensors)


class MovementSums(ModelSums):
    """Sums of -g_w w over the steps of plain SGD on a copy of the model: totals {group: (units,)}."""

    forward: ClassVar[bool] = False

    def __init__(self, model: nn.Module, groups: Sequence[GroupLayer], lr: float, epochs: int):
        super().__init__(model, groups)
        self.lr, self.rounds = lr, epochs  # type: ignore[misc]
        self.copy = copy_of(model).eval()
        self.trained = [p.requires_grad_() for p in self.copy.parameters() if p.is_floating_point()]
        self.totals = {group.name: self.zeros(group.group.n) for group in groups}

    @classmethod
    def times(cls, *options: Any) -> int:
        return int(options[1])

    def end(self, logits: Tensor | None, objective: Objective) -> None:
        batch = self.batch
        with torch.enable_grad():
            total = objective.summed(objective.run(self.copy, batch), batch.labels) / int(batch.predicted.sum().clamp_min(1))
            gradients = gradients_of(total, self.trained)
        steps = {id(p): g for p, g in zip(self.trained, gradients, strict=True) if g is not None}
        for group in self.groups:
            for piece in self.pieces(group):
                weight = whole(self.copy, piece)
                if id(weight) in steps:
                    self.reached.add(piece.name)
                    pull = piece.by_unit(self.copy).double() * entries(piece, steps[id(weight)])
                    self.totals[group.name] -= pull.sum(1).to(self.device)
        for p in self.trained:
            if id(p) in steps:
                p.sub_(self.lr * steps[id(p)])

    def pieces(self, group: GroupLayer) -> list[GroupSlice]:
        return group.pieces("producer")

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"trained": [p.detach() for p in self.trained]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        with torch.no_grad():
            for p, saved in zip(self.trained, state["trained"], strict=True):
                p.copy_(saved)


def gradients_of(total: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of a number, None for a tensor on which it does not depend. Nothing is left in ``.grad``.

    A backward pass, because ``torch.autograd.grad`` refuses re-entrant checkpoints.
    """
    if total.requires_grad:
        total.backward()
    gradients = [t.grad for t in tensors]
    for t in tensors:
        t.grad = None
    return gradients


def whole(model: nn.Module, piece: GroupSlice) -> Tensor:
    """The whole tensor of a slice, with all experts, as the model stores it."""
    return getattr(model.get_submodule(piece.module), piece.tensor)


def entries(piece: GroupSlice, tensor: Tensor) -> Tensor:
    """The units' entries of a tensor with the shape of the sliced one, (units, other entries)."""
    part = tensor if piece.entry is None else tensor[piece.entry]
    moved = part.movedim(piece.dim - (piece.entry is not None), 0)
    return moved[piece.index.to(part.device)].flatten(1)


def _part(batch: Batch, first: int, samples: int) -> Batch:
    """Some samples of a batch."""
    return batch.map(lambda t: t[first : first + samples])
