"""One pass over the data, and what it adds up for the published criteria."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from nodelens.engine.analyze import device_of
from nodelens.network.batch import Batch, logits_of
from nodelens.network.eval_mode import eval_mode
from nodelens.network.experts import Call, Experts
from nodelens.network.groups import GroupSlice, PruningGroup
from nodelens.network.hooks import Capture, Edit, Site, edit, observed
from nodelens.network.layers import Layer
from nodelens.statistics.processes import reduce_tensor
from nodelens.statistics.rows import Rows

Loss = Callable[[Tensor, Tensor | None], Tensor]
Progress = Callable[[Iterable[Any]], Iterable[Any]]


class Sums:
    """What a pass adds up, in float64, for the units of some groups: each batch is shown once.

    paths: modules that have to run; where ``reads`` is true, what they read is shown. mixtures: modules of experts, whose calls
    are shown. parameters: what the summed loss is differentiated in, beside the ``leaves`` that a batch's forward pass makes.
    rounds: how often the data are read; round: which of them this is, from 0. forward: whether the model itself has to run.
    """

    reads: ClassVar[bool] = False
    forward: ClassVar[bool] = True
    rounds = 1
    round = 0

    def __init__(self, model: nn.Module, groups: Sequence[PruningGroup]):
        self.model, self.groups, self.device = model, groups, device_of(model)
        self.paths: list[str] = []
        self.mixtures: list[str] = []
        self.parameters: list[Tensor] = []
        self.totals: dict[Any, Tensor] = {}  # what adds up over processes as it is

    def zeros(self, *shape: int) -> Tensor:
        """A sum before anything was added."""
        return torch.zeros(*shape, dtype=torch.float64, device=self.device)

    def begin(self, batch: Batch) -> None:
        self.batch = batch

    def edits(self) -> tuple[Mapping[str, Edit], Mapping[str, Edit]]:
        """Changes of what modules put out, and of what they read, by path."""
        return {}, {}

    def see(self, path: str, rows: Rows) -> None:
        """Takes what a module reads; padded tokens are not kept."""

    def called(self, path: str, call: Call) -> None:
        """Takes one call of a module of experts."""

    def leaves(self) -> list[Tensor]:
        """What the loss of the batch is differentiated in."""
        return self.parameters

    def take(self, gradients: Sequence[Tensor | None]) -> None:
        """Takes the gradients of the leaves."""

    def end(self, logits: Tensor | None, loss: Loss) -> None:
        """Ends the batch, all edits undone and no graph recorded; logits are None where no sums wanted the model to run."""

    def again(self) -> None:
        """Called between two rounds over the data."""

    def reduce(self) -> None:
        """Makes sums those of all processes. Collective."""
        self.totals = {key: reduce_tensor(total) for key, total in self.totals.items()}


class Need(NamedTuple):
    """Sums that a criterion wants, with their options: equal ones are formed once."""

    sums: type[Sums]
    options: tuple[Any, ...] = ()


def collect(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    needs: Iterable[Need],
    data: Iterable[Any],
    seed: int,
    loss: Loss,
    progress: Progress,
) -> dict[Need, Any]:
    """The sums of every need, of all processes' data. The model is as before when it ends, however it ends.

    Raises ValueError where the data are empty, a module that is to be read never runs, the loss does not depend on the units,
    or data are wanted again that can be read once only.
    """
    found = {need: need.sums(model, groups, *need.options) for need in dict.fromkeys(needs)}
    rounds = max((sums.rounds for sums in found.values()), default=0)
    if rounds > 1 and iter(data) is data:
        raise ValueError(f"the data are read {rounds} times, and are an iterator: give a loader or a list of batches")
    for k in range(rounds):
        for sums in found.values():
            sums.round = k
            if 0 < k < sums.rounds:
                sums.again()
        _read(model, [sums for sums in found.values() if sums.rounds > k], progress(data), seed, loss)
    for sums in found.values():
        sums.reduce()
    return found


def counted(call: Call, batch: Batch) -> Tensor:
    """Which of a call's tokens are not padded, (samples, positions) bool. Raises ValueError where samples do not divide them."""
    if call.tokens % len(batch):
        raise ValueError(f"experts get {call.tokens} tokens for a batch of {len(batch)} samples: they must belong to samples")
    shape = (len(batch), call.tokens // len(batch))
    if batch.mask is not None and batch.mask.shape == shape:
        return batch.mask.to(call.rows.device)
    return torch.ones(shape, dtype=torch.bool, device=call.rows.device)


def consumers(groups: Iterable[PruningGroup]) -> list[GroupSlice]:
    """Every piece that reads units."""
    return [piece for group in groups for piece in group.by_role("consumer")]


@contextmanager
def differentiable(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Inside, tensors take a gradient; afterwards those that did not do not."""
    changed = [t for t in tensors if not t.requires_grad]
    try:
        for t in changed:
            t.requires_grad_(True)
        yield
    finally:
        for t in changed:
            t.requires_grad_(False)


def _read(model: nn.Module, every: list[Sums], data: Iterable[Any], seed: int, loss: Loss) -> None:
    """Shows every batch to the sums."""
    device, samples = device_of(model), 0
    sites = {path: Site(Layer(path, model.get_submodule(path)), "input") for sums in every for path in sums.paths}
    mixtures = {model.get_submodule(path): path for sums in every for path in sums.mixtures}
    batch: Batch

    def see(site: Site, tensor: Tensor) -> None:
        path = site.layer.name
        taking = [sums for sums in every if sums.reads and path in sums.paths]
        if taking:
            rows = _rows(site.layer, tensor, batch)
            for sums in taking:
                sums.see(path, rows)

    def called(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if not capture.gate:
            return
        path, experts = mixtures[module], Experts.of(module)
        assert experts is not None
        with torch.no_grad():
            call = Call.of(experts, path, args, kwargs)
            if not capture.fired[path]:
                call.check(path, output)
            capture.fired[path] += 1
            for sums in every:
                if path in sums.mixtures:
                    sums.called(path, call)

    capture = Capture(sites.values(), see)
    leaves = differentiable([p for sums in every for p in sums.parameters])
    with eval_mode(model), leaves, capture, observed(mixtures, called):
        for batch in data:
            batch = Batch.of(batch, seed=seed).to(device)
            samples += len(batch)
            for sums in every:
                sums.begin(batch)
            logits = _forward(model, batch, every, capture, loss) if any(sums.forward for sums in every) else None
            with torch.no_grad():
                for sums in every:
                    sums.end(logits, loss)
    if not int(reduce_tensor(torch.tensor(samples, device=device))):
        raise ValueError("the data are empty: not one batch to score units by")
    fired = {path: str(site) for path, site in sites.items()} | {path: path for path in mixtures.values()}
    silent = [path for path, name in fired.items() if not capture.fired[name]]
    if samples and silent:
        raise ValueError(
            f"module {silent[0]!r} is never called by {type(model).__name__}.forward (its parent may read its weight "
            "directly): leave its group out of the scope, or score it by weights"
        )


def _forward(model: nn.Module, batch: Batch, every: list[Sums], capture: Capture, loss: Loss) -> Tensor:
    """One batch forward and, where something is differentiated, backward; the logits."""
    changes = [sums.edits() for sums in every]
    outputs, inputs = (_composed(model, [change[side] for change in changes]) for side in (0, 1))
    wanted = bool(outputs or inputs or any(sums.parameters for sums in every))
    capture.gate = True
    with edit(outputs, inputs), torch.set_grad_enabled(wanted):
        logits = logits_of(batch.run(model))
        capture.gate = False
        if wanted:
            _differentiate(loss(logits, batch.labels), every)
    return logits.detach()


def _differentiate(total: Tensor, every: list[Sums]) -> None:
    leaves = [sums.leaves() for sums in every]
    if not any(leaves):
        return  # no gate's module ran
    if not total.requires_grad:
        raise ValueError("the loss does not depend on the units: loss= gives a number without a gradient")
    gradients = list(torch.autograd.grad(total, [leaf for held in leaves for leaf in held], allow_unused=True))
    for sums, held in zip(every, leaves, strict=True):
        sums.take(gradients[: len(held)])
        del gradients[: len(held)]


def _composed(model: nn.Module, changes: Iterable[Mapping[str, Edit]]) -> dict[nn.Module, Edit]:
    """One function a module, of those that several sums have for it."""
    by_module: dict[nn.Module, list[Edit]] = {}
    for change in changes:
        for path, function in change.items():
            by_module.setdefault(model.get_submodule(path), []).append(function)
    return {module: lambda x, each=each: reduce(lambda v, f: f(v), each, x) for module, each in by_module.items()}  # type: ignore[misc]


def _rows(layer: Layer, tensor: Tensor, batch: Batch) -> Rows:
    """What a module reads, as rows about zero, without padded tokens."""
    rows = layer.rows(tensor, len(batch), batch.mask)
    zero = torch.zeros(rows.raw.shape[1], dtype=torch.float64, device=tensor.device)
    return rows.about(zero, shifted=False).finite()
