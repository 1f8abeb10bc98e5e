"""The operations of a forward pass: recorded while it runs or, where values decide what runs, exported."""

import io
import logging
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nodelens.network.batch import Batch
from nodelens.network.hooks import entered

_BY_VALUE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_OUTSIDE = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class _UnclearError(Exception):
    """One run does not tell the operations of all: the path of the module where, and why."""


@dataclass(eq=False, repr=False, slots=True)
class Operation:
    """One operation of a forward pass, with the attributes of ``torch.fx.Node`` that describe it.

    op: call_function, placeholder (a value that no operation makes) or output; target: the ATen operation. Operations among the
    arguments stand for their results.
    meta: ``val`` is a tensor of the shape of the result, ``nn_module_stack`` has the module that runs the operation.
    """

    op: str
    name: str
    target: Any
    args: Any = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    all_input_nodes: list["Operation"] = field(default_factory=list)
    users: dict["Operation", None] = field(default_factory=dict)


Node = Operation | torch.fx.Node


@dataclass(frozen=True)
class Operations:
    """The operations of a forward pass, in order.

    stored: {placeholder: name of the parameter or buffer}; inputs: placeholders of the model's arguments
    """

    nodes: Sequence[Node]
    stored: Mapping[str, str]
    inputs: Sequence[str]


def operations(model: nn.Module, batch: Batch) -> Operations:
    """The operations of a forward pass of the model in its present mode, before any is decomposed into others.

    They are recorded while the model runs. ``torch.export``, which is slower, traces the model where one run does not tell the
    operations of all: where the values of tensors decide what is done, or where a tensor comes from outside PyTorch.
    Raises what the forward pass or ``torch.export`` raises.
    """
    try:
        return _recorded(model, batch)
    except _UnclearError:
        return _exported(model, batch)


def why_unclear(model: nn.Module, batch: Batch) -> str:
    """Where and why one run of the model does not tell its operations; "" if it does, or fails in another way."""
    try:
        _recorded(model, batch)
    except _UnclearError as error:
        path, why = error.args
        owner = model.get_submodule(path)
        return f"in {path} ({type(owner).__name__}), {why}" if path else why
    except Exception:  # a forward pass may raise anything
        pass
    return ""


def _recorded(model: nn.Module, batch: Batch) -> Operations:
    recorder, batch = _Recorder(model), batch.copied()
    inputs = [recorder.placeholder("input", value).name for value in tree_leaves((batch.args, batch.kwargs))]
    whole = torch._C._AutoDispatchBelowAutograd()  # above autograd, operations that consist of others would come in parts
    with torch.no_grad(), entered(model, recorder.stack), _Inside(recorder), whole, recorder:
        output = model(*batch.args, **batch.kwargs)
    return Operations(recorder.finish(output), recorder.stored, inputs)


def _exported(model: nn.Module, batch: Batch) -> Operations:
    with _quiet(), warnings.catch_warnings():  # recurrent layers keep their weights in a list, too, which the program does not read
        warnings.filterwarnings("ignore", message="The tensor attributes? .* assigned during export")
        program = torch.export.export(model, batch.args, batch.kwargs)
    signature = program.graph_signature
    inputs = [name for name in signature.user_inputs if isinstance(name, str)]
    return Operations(list(program.graph.nodes), {**signature.inputs_to_parameters, **signature.inputs_to_buffers}, inputs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps from the terminal the pages of a graph that ``torch.export`` prints about a model that it cannot trace."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


class _Inside(TorchFunctionMode):
    """Stops where the content of a tensor leaves PyTorch without an operation."""

    def __init__(self, recorder: "_Recorder"):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _OUTSIDE:
            raise self.recorder.unclear(f"{function.__name__} takes values out of a tensor, and they may decide what runs")
        return function(*args, **kwargs) if kwargs else function(*args)


class _Recorder(TorchDispatchMode):
    """Makes a list of operations. The last entry of ``stack`` is the path of the module that runs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.nodes, self.stack, self.stored = model, list[Operation](), [""], dict[str, str]()
        self.known: dict[int, tuple[weakref.ref, Operation]] = {}  # by the id of a tensor; an id is used again
        self.own: dict[int, str] = {}  # names of parameters and buffers by the id of the tensor
        for named in (model.named_parameters, model.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                self.own.setdefault(id(tensor), name)
        self.constants: set[int] | None = None

    def unclear(self, why: str) -> _UnclearError:
        """The error for what happens in the module that runs."""
        return _UnclearError(self.stack[-1], why)

    def placeholder(self, name: str, value: Any) -> Operation:
        """Adds a value that no operation makes."""
        return self._add("placeholder", name, value)

    def _add(self, op: str, target: Any, value: Any, args: Any = (), kwargs: Any = None, sources: Any = ()) -> Operation:
        node = Operation(op, f"{op}_{len(self.nodes)}", target, args, kwargs or {}, all_input_nodes=list(dict.fromkeys(sources)))
        node.meta = {"nn_module_stack": {"": (self.stack[-1], None)}, "val": _shaped(value)}
        for source in node.all_input_nodes:
            source.users[node] = None
        if isinstance(value, Tensor):
            self.known[id(value)] = weakref.ref(value), node
        self.nodes.append(node)
        return node

    def _node(self, value: Tensor) -> Operation:
        """What made a tensor."""
        reference, node = self.known.get(id(value), (None, None))
        if node is not None and reference() is value:  # type: ignore[misc]
            return node
        name = self.own.get(id(value))
        if name is None and id(value) not in self._constants():
            raise self.unclear("a tensor is read that neither an operation of this run nor a parameter is")
        node = self.placeholder(name or "constant", value)
        self.stored |= {node.name: name} if name else {}
        return node

    def _constants(self) -> set[int]:
        """The ids of tensors that modules hold as plain attributes."""
        if self.constants is None:
            held = [value for module in self.model.modules() for value in vars(module).values()]
            self.constants = {id(value) for value in tree_leaves(held) if isinstance(value, Tensor)}
        return self.constants

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten.lift_fresh.default:  # of torch.tensor(...): a new constant
            self.placeholder("constant", args[0])
        if _by_value(function, args):
            raise self.unclear(f"{str(function).removeprefix('aten.').partition('.')[0]} lets values decide what runs, or a shape")
        sources: list[Operation] = []
        node_args, node_kwargs = self._nodes(args, sources), self._nodes(kwargs, sources)
        found = function(*args, **kwargs)
        node = self._add("call_function", function, found, node_args, node_kwargs, sources)
        if isinstance(found, (tuple, list)):
            for k, part in enumerate(found):
                self._add("call_function", getitem, part, (node, k), sources=[node])
        elif not isinstance(found, Tensor) and found is not None:
            raise self.unclear(f"{function} returns {type(found).__name__}")
        return found

    def _nodes(self, value: Any, sources: list[Operation]) -> Any:
        """The arguments of an operation with what made each tensor in its place, which is added to ``sources``."""
        if isinstance(value, Tensor):
            sources.append(self._node(value))
            return sources[-1]
        if isinstance(value, (tuple, list)):
            return tuple(self._nodes(each, sources) for each in value)
        if isinstance(value, dict):
            return {name: self._nodes(each, sources) for name, each in value.items()}
        return value

    def finish(self, output: Any) -> list[Operation]:
        """The operations and, last, what the model puts out."""
        leaves = tree_leaves(output)
        if other := [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, (Tensor, *_PLAIN))]:
            raise self.unclear(f"the output has {other[0]} in it")
        sources: list[Operation] = []
        made = self._nodes(leaves, sources)
        self._add("output", "output", None, (made,), sources=sources)
        return self.nodes


def _by_value(function: Any, args: Any) -> bool:
    """Whether values decide what an operation returns, or its shape: as an index does only if it is a mask."""
    if _BY_VALUE.isdisjoint(function.tags):
        return False
    by_ids = function is torch.ops.aten.index.Tensor and all(i is None or i.dtype in (torch.int64, torch.int32) for i in args[1])
    return not by_ids


def _shaped(value: Any) -> Any:
    """Tensors of the same shapes without values."""
    if isinstance(value, (tuple, list)):
        return [_shaped(each) for each in value]
    if not isinstance(value, Tensor):
        return value
    with torch._C.DisableTorchFunction():
        return torch.empty(value.shape, device="meta")
