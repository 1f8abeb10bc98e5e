"""Replay: a model runs again from a site on, while every module that had returned before the site returns its recorded output."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nodelens.network.batch import read_of, tensor_of

_PLAIN = (Tensor, int, float, str, type(None))
Function = Callable[[tuple, dict], Any]


@dataclass(eq=False)
class RecordedCall:
    """One call of a module in a recorded pass.

    start, end: places in the order of all events of the pass. output: a copy, where the call can be replayed. written: whether a
    later operation changed the output in place, so that each replay needs a copy of its own. source: the call whose output this
    one reads first, as it was returned. read: a copy of the tensor that an edit of the call's input changes, where it is asked for.
    """

    module: nn.Module
    parent: "RecordedCall | None"
    start: int
    end: int = -1
    output: Any = None
    known: bool = False
    written: bool = False
    source: "RecordedCall | None" = None
    read: Tensor | None = None
    versions: list[tuple[Tensor, int]] = field(default_factory=list)


class Recording:
    """The calls of a pass through a model, in order, and what they returned.

    A call that returned before a site was called cannot depend on what the site reads: Python runs one statement after the other.
    ``replayed`` skips such calls. A call is not skipped, but its own calls may be, if it returns anything but tensors and plain
    values, or changes one of its inputs in place. Operations outside of skipped modules run again.
    """

    def __init__(self, inputs: Collection[nn.Module] = ()) -> None:
        self.inputs = inputs
        self.calls: list[RecordedCall] = []
        self.output: Any = None
        self._open: list[RecordedCall] = []
        self._clock = 0
        self._made: dict[
            int, tuple[Tensor, int, RecordedCall]
        ] = {}  # by id of a tensor, which is held so that the id stays its own

    @classmethod
    def of(cls, model: nn.Module, run: Callable[[], Any], inputs: Collection[nn.Module] = ()) -> "Recording":
        """Records the calls of all modules inside ``model`` while ``run`` runs it, and what ``inputs`` read.

        ``output`` is what ``run`` returns.
        """
        found = cls(inputs)
        with _forwards({m: partial(found._recorded, m) for m in model.modules() if m is not model}):
            found.output = run()
        for call in found.calls:
            call.written = any(_version(tensor) != version for tensor, version in call.versions)
            call.versions = []
        found._made = {}
        return found

    def before(self, time: int) -> list[RecordedCall]:
        """The outermost calls that had returned at a time, such as the start of a call, and can be replayed."""
        found: list[RecordedCall] = []
        skipped: set[RecordedCall] = set()
        for call in self.calls:
            if call.parent in skipped:
                skipped.add(call)
            elif call.known and call.end <= time:
                skipped.add(call)
                found.append(call)
        return found

    @contextmanager
    def replayed(self, outputs: Mapping[RecordedCall, Any], own: Mapping[RecordedCall, Function] | None = None) -> Iterator[None]:
        """Inside, a pass skips the calls in ``outputs``, some of ``before(time)``, and returns these outputs instead.

        own: functions of a call's arguments that compute its output. The context is for one pass.
        """
        own = own or {}
        turns: dict[nn.Module, list[Function | None]] = {call.module: [] for call in (*outputs, *own)}
        inside: set[RecordedCall] = set()
        for call in self.calls:
            if call.parent in inside or call.parent in outputs:
                inside.add(call)
            elif call.module in turns:
                given = partial(_returned, outputs[call], call.written) if call in outputs else own.get(call)
                turns[call.module].append(given)
        with _forwards({module: partial(_in_turn, iter(every)) for module, every in turns.items()}):
            yield

    def _recorded(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        read = [(tensor, _version(tensor)) for tensor in _tensors((args, kwargs))]
        call = RecordedCall(
            module, self._open[-1] if self._open else None, self._tick(), source=self._source(read[0][0] if read else None)
        )
        if module in self.inputs and (shown := tensor_of(read_of(args, kwargs))) is not None:
            call.read = shown.clone()
        self.calls.append(call)
        self._open.append(call)
        try:
            output = forward(*args, **kwargs)
        finally:
            self._open.pop()
        call.end = self._tick()
        unchanged = all(_version(tensor) == version for tensor, version in read)
        if unchanged and all(isinstance(leaf, _PLAIN) for leaf in pytree.tree_leaves(output)):
            call.known, call.output = True, _copied(output)
            call.versions = [(tensor, _version(tensor)) for tensor in _tensors(output)]
        if isinstance(output, Tensor) and self._source(output) is None:
            self._made[id(output)] = (output, _version(output), call)
        return output

    def _source(self, tensor: Tensor | None) -> RecordedCall | None:
        """The innermost call that returned a tensor which has not changed since."""
        made, version, call = self._made.get(id(tensor), (None, -1, None))
        return call if made is not None and _version(made) == version else None

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def tiled(output: Any, copies: int, samples: int) -> Any:
    """An output for several copies of the batch, one after the other; only tensors with one row per sample are repeated."""

    def each(tensor: Tensor) -> Tensor:
        rows = tensor.ndim > 0 and len(tensor) == samples  # of tokens that a router chose, nobody knows whose they are
        return torch.cat([tensor] * copies) if rows else tensor  # unlike repeat, it keeps the memory layout

    return output if copies == 1 else pytree.tree_map_only(Tensor, each, output)


def channels_last(output: Any) -> Any:
    """An output with its maps, which are tensors of four dimensions, in that memory layout."""

    def each(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

    return pytree.tree_map_only(Tensor, each, output)


def largest_output(calls: Sequence[RecordedCall]) -> int:
    """Bytes of the largest tensor that one of the calls returned."""
    return max((tensor.numel() * tensor.itemsize for call in calls for tensor in _tensors(call.output)), default=0)


def _in_turn(turns: Iterator[Function | None], forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    own = next(turns, None)
    return forward(*args, **kwargs) if own is None else own(args, kwargs)


def _returned(output: Any, written: bool, args: tuple, kwargs: dict) -> Any:
    return _copied(output) if written else output


@contextmanager
def _forwards(around: Mapping[nn.Module, Callable[[Callable[..., Any], tuple, dict], Any]]) -> Iterator[None]:
    """Inside, the modules' ``forward`` is the function given for them, called with the old one, its arguments and keywords."""
    before = {module: module.__dict__.get("forward") for module in around}
    try:
        for module, function in around.items():
            module.__dict__["forward"] = _around(module.forward, function)
        yield
    finally:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


def _around(forward: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)  # models look up the names of a module's arguments
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return function(forward, args, kwargs)

    return replaced


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _copied(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, value)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
