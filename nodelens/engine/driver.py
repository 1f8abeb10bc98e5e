"""The driver: reads data batch by batch and runs the model on them for whoever measures."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nodelens.network.batch import Batch
from nodelens.network.batch_forms import few, read
from nodelens.network.eval_mode import differentiable, eval_mode
from nodelens.network.failed_forward import check_forward
from nodelens.network.hooks import Capture, edit
from nodelens.network.objective import Objective
from nodelens.network.sharded import is_sharded
from nodelens.statistics.processes import first_of, reduce_tensor, world

from .overwritten import why_overwritten

_UNREADABLE = (OSError, RuntimeError, LookupError, TypeError, ValueError)  # what data sets raise
_FEW = 8  # samples
Progress = Callable[[Iterable[Any]], Iterable[Any]]


class Watcher(Protocol):
    """Measures during a reading of the data: called before and after the model runs on a batch."""

    def begin(self, batch: Batch) -> None: ...
    def end(self, predictions: Tensor | None) -> None: ...


@dataclass
class Driver:
    """How data are read, in eval mode on the model's device.

    groups, seed, cuts: of the jackknife, see ``Batch.of``; hashes: of the samples of batches, by the id of what was given
    graph:         whether the loss is differentiated, with respect to whatever the capture watches
    on_graph:      called with the predictions, and the outputs of embeddings at which the graph starts, while the graph is there
    weights:       tensors whose gradients of the summed loss are in ``.grad`` when a batch ends
    from_inputs:   whether the graph starts at the inputs: they are differentiated, or an in-place operation would break one that
                   starts at a layer
    runs_model:    whether the model runs at all; answers: whether predictions are read from its output
    on_first, on_last: checks after the first and the last batch, while the model is as it was for them
    progress:      wraps the batches, for a progress bar
    """

    model: nn.Module
    objective: Objective
    groups: int = 1
    seed: int = 0
    graph: bool = False
    weights: tuple[Tensor, ...] = ()
    from_inputs: bool = False
    runs_model: bool = True
    answers: bool = True
    on_graph: Callable[[Tensor, Sequence[Tensor]], None] | None = None
    cuts: Tensor | None = None
    hashes: Mapping[int, Tensor] = field(default_factory=dict)
    on_first: Callable[[Batch], None] | None = None
    on_last: Callable[[Batch], None] | None = None
    progress: Progress = iter
    number: int = 0  # of the batch that is being read
    embedded: list[Tensor] = field(default_factory=list)  # the outputs of embeddings in this batch

    def batches(self, data: Iterable[Any]) -> Iterator[Batch]:
        """The batches, on the model's device."""
        device = device_of(self.model)
        for number, given in enumerate(numbered(self.progress(data))):
            self.number = number
            with naming(number):
                batch = self.objective.batch(given, self.groups, self.seed, self.cuts, self.hashes.get(id(given)))
            if len(batch):
                yield batch.to(device)

    def _in_step(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, bool]]:
        """The batches, and whether they are to be measured. Collective for a sharded model, which every process runs as often.

        A process that has no more batches gets its last one again, or a sample of another process, which is not measured.
        """
        if world()[1] == 1 or not is_sharded(self.model):
            yield from ((batch, True) for batch in batches)
            return
        device = device_of(self.model)
        last: Any = None
        for own in itertools.chain(batches, itertools.repeat(None)):
            last = last if own is None else own
            state = torch.tensor([own is not None, last is None], dtype=torch.int64, device=device)
            there, lacking = reduce_tensor(state, largest=True).tolist()
            if not there:
                return
            if lacking:
                shared = first_of(None if own is None else own.head(1).to(torch.device("cpu")))
                last = shared.to(device) if last is None else last
            yield last, own is not None

    def run(self, data: Iterable[Any], watcher: Watcher, capture: Capture | None = None) -> None:
        """Runs every batch. The model's state is restored, also after an error."""
        opened: AbstractContextManager[Any] = nullcontext() if capture is None else capture
        starts = graph_starts(self.model, self.embedded) if self.from_inputs else nullcontext()
        plain = nullcontext() if self.on_graph is None else twice_differentiable()
        with torch.inference_mode(False), eval_mode(self.model), differentiable(self.weights), starts, opened, plain:
            last: Batch | None = None
            for batch, measured in self._in_step(self.batches(data)):
                self.embedded.clear()
                batch = with_gradients(batch) if self.from_inputs else batch
                with naming(self.number, partial(self._why, batch)):
                    if measured:
                        watcher.begin(batch)
                        watcher.end(self._forward(batch, capture))
                    else:
                        with nullcontext() if capture is None else capture.dropping():
                            self._forward(batch, capture)
                for tensor in self.weights:
                    tensor.grad = None
                if last is None and self.on_first is not None:
                    self.on_first(batch)
                last = batch
            if last is not None and self.on_last is not None:
                self.on_last(last)

    def _why(self, batch: Batch, error: Exception) -> str:
        """The reason of an error of torch, with what to change, if it is known."""
        return batch.wrong_dtype(self.model, error) or why_overwritten(self.model, batch, self.objective, error)

    def _forward(self, batch: Batch, capture: Capture | None) -> Tensor | None:
        """Runs one batch forward and, for a graph, backward; returns its predictions."""
        if not self.runs_model:
            return None
        gate = Capture([], print) if capture is None else capture
        gate.gate = True
        try:
            with torch.set_grad_enabled(self.graph or self.on_graph is not None):
                output = self._output(batch, gate)
                gate.gate = False
                predictions = self.objective.answer(output) if self.answers else None
                if self.on_graph is not None and predictions is not None:
                    self.on_graph(predictions, self.embedded)
                total = self.objective.summed(predictions, batch.labels) if self.graph else None  # type: ignore[arg-type]
                gate.recomputing = True
                if total is not None and total.requires_grad:
                    total.backward()
        finally:
            gate.gate = gate.recomputing = False
        return None if predictions is None else predictions.detach()

    def _output(self, batch: Batch, gate: Capture) -> Any:
        """The model's output. Raises ValueError, with what to change, if the model cannot take the batch."""
        try:
            return batch.run(self.model)
        except Exception:  # a forward pass may raise anything; an error of a hook is raised as it is
            gate.gate = False
            check_forward(self.model, batch)
            raise


def opened(model: nn.Module, data: Iterable[Any], objective: Objective) -> tuple[Objective, Iterable[Any]]:
    """The objective, settled by the first batch, and the data from their beginning. Collective for a sharded model."""
    first, whole = (shared_first if is_sharded(model) else first_of_data)(data, objective)
    return (objective, ()) if first is None else (objective.settled(model, first), whole)


def first_of_data(data: Iterable[Any], objective: Objective) -> tuple[Any, Iterable[Any]]:
    """The first batch with samples, and the data from their beginning; None and nothing if there is no such batch."""
    batches = numbered(data)
    before: list[Any] = []
    for number, batch in enumerate(batches):
        before.append(batch)
        with naming(number):
            samples = len(read(batch, objective.required).first)
        if samples:
            return batch, itertools.chain(before, batches)
    return None, ()


def shared_first(data: Iterable[Any], objective: Objective) -> tuple[Any, Iterable[Any]]:
    """As ``first_of_data``; a process without data gets a few samples of another one's first batch. Collective.

    The first batch is None if no process has data.
    """
    first, whole = first_of_data(data, objective)
    there = first_of(None if first is None or world()[1] == 1 else few(first, _FEW))
    return (there if first is None else first), whole


def numbered(data: Iterable[Any]) -> Iterator[Any]:
    """The batches. Raises ValueError, with the number of the batch, if one cannot be read."""
    batches, number = iter(data), 0
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except _UNREADABLE as error:
            if str(error).startswith("batch "):  # by a reading within this one
                raise
            raise ValueError(f"batch {number} of the data (counted from 0) cannot be read: {_last_line(error)}") from error
        yield batch
        number += 1


@contextmanager
def naming(number: int, reason: Callable[[Exception], str] = lambda error: "") -> Iterator[None]:
    """Inside, errors of a batch but the first, and those of torch, name the number of the batch; reason: of an error of torch."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"batch {number} of the data (counted from 0): {reason(error) or _last_line(error)}") from error
    except ValueError as error:
        if not number or str(error).startswith("batch "):
            raise
        raise ValueError(f"batch {number} of the data (counted from 0): {error}") from error


def _last_line(error: Exception) -> str:
    """What an error says; of one in a worker process of a loader, which shows a whole traceback, its last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if "Traceback" in str(error) else lines[0]


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter or buffer; the CPU for a model without any."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def with_gradients(batch: Batch) -> Batch:
    """The batch with inputs that take a gradient."""
    named = {name: _require_grad(value) for name, value in batch.kwargs.items()}
    return replace(batch, args=tuple(map(_require_grad, batch.args)), kwargs=named)


@contextmanager
def graph_starts(model: nn.Module, embedded: list[Tensor]) -> Iterator[None]:
    """Context in which the graph starts at the outputs of embeddings, which are listed in ``embedded``."""

    def start(output: Tensor) -> Tensor:
        """A leaf, copied because later operations may write into it in place."""
        if not torch.is_grad_enabled():
            return output
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()

    with edit(dict.fromkeys([m for m in model.modules() if isinstance(m, nn.Embedding)], start)):
        yield


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Context in which attention runs without fused kernels, whose derivatives have no derivative."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


def _require_grad(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
