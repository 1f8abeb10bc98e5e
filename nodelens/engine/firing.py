"""Which activation follows a layer, found in the operations of the dry run, and the layer's units behind it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nodelens.network.sharded import full, is_part, is_sharded

_ACTIVATIONS = (
    "relu", "hardtanh", "leaky_relu", "_prelu_kernel", "elu", "celu", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "sigmoid",
    "tanh", "softplus", "threshold", "clamp", "clamp_min", "hardshrink", "softshrink", "log_sigmoid_forward",
)  # fmt: skip
_NORMS = ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit_no_training", "native_group_norm")
_POOLS = ("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d")
_BETWEEN = (*_NORMS, *_POOLS, *(f"max_pool{k}d_with_indices" for k in (2, 3)), "clone", "_to_copy")  # keep units apart
_IGNORED = ("empty_like", "zeros_like")  # read no value
BEHIND = "activated"  # the port of a layer's units behind its activation
Place = tuple[Any, torch.Size]


class Stored(NamedTuple):
    """A parameter or buffer of the model as the argument of an operation."""

    name: str
    shape: tuple[int, ...]


class Step(NamedTuple):
    """An operation on a layer's output. The first argument, the value itself, is left out; arguments may be ``Stored`` tensors."""

    operation: str
    overload: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, x: Tensor, training: bool = False, own: bool = False) -> Tensor:
        """The operation's result. own: whether x may be overwritten, which saves the memory of another tensor."""
        call, args = getattr(getattr(torch.ops.aten, self.operation), self.overload), self.args
        if own and self.operation == "relu":
            return x.relu_()
        if self.operation == "native_group_norm":
            args = (*args[:2], len(x), *args[3:])
        elif training and self.operation in _NORMS:  # statistics of the batch; the running ones are left as they are
            args, call = (*args[:2], None, None, True, 0.0, args[-1]), torch.ops.aten.native_batch_norm.default
        found = call(x, *args, **self.kwargs)
        return found if isinstance(found, Tensor) else found[0]


@dataclass(frozen=True)
class Firing:
    """The operations from a layer's output to the first activation, which keep its units apart: norms, pooling, the activation."""

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        names = (step.operation.removesuffix("_with_indices").removesuffix("_forward") for step in self.steps)
        short = dict.fromkeys(_NORMS[:-1], "batch_norm") | {"native_group_norm": "group_norm", "_prelu_kernel": "prelu"}
        return ", ".join(short.get(name, name) for name in names if name not in ("clone", "_to_copy"))

    def __call__(self, x: Tensor, training: bool = False) -> Tensor:
        """The units behind the activation, given the layer's output, which is not changed. ``training``: of batch norms."""
        with torch.no_grad():
            for k, step in enumerate(self.steps):
                x = step(x, training, own=k > 0)
        return x

    @property
    def has_norm(self) -> bool:
        """Whether samples depend on each other in training."""
        return any(step.operation in _NORMS for step in self.steps)

    def bound(self, tensors: Mapping[str, Tensor]) -> "Firing":
        """The same operations with the ``stored_tensors`` of a model. Collective for a sharded model."""

        def value(given: Any) -> Any:
            return full(tensors[given.name].detach()).view(given.shape) if isinstance(given, Stored) else given

        return Firing(tuple(step._replace(args=tuple(map(value, step.args))) for step in self.steps))


@dataclass
class _Value:
    """A tensor on the way from a layer's output to its activation. It is held, so that no other tensor gets its address."""

    tensor: Tensor
    readers: int = 0
    step: Step | None = None  # of the only reader
    result: "_Value | None" = None  # what that operation returned

    def path(self) -> tuple[list[Step], Tensor] | None:
        """The operations up to the activation, and its result; None if there is none, or a value has several readers."""
        if self.readers != 1 or self.step is None or self.result is None:
            return None
        if self.step.operation in _ACTIVATIONS:
            return [self.step], self.result.tensor
        rest = self.result.path()
        return None if rest is None else ([self.step, *rest[0]], rest[1])


class FiringTracer(TorchDispatchMode):
    """Records, while a model runs, the operations that read the outputs of layers."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.moves = model, is_sharded(model)
        self.places = self._places()  # where parameters and buffers are: those of a sharded model only while its modules run
        self.values: dict[Place, _Value] = {}  # that an operation may still read
        self.outputs: dict[str, list[_Value]] = {}  # by layer, one per call
        self.last: tuple[str, Place | None] = ("", None)  # the last operation and its result

    def start(self, layer: str, output: Tensor) -> None:
        """Follows the output of a layer from here on, unless an activation has just made it."""
        if self.last[0] in _ACTIVATIONS and self.last[1] == place_of(output):
            return
        value = self.values.setdefault(place_of(output), _Value(output))
        self.outputs.setdefault(layer, []).append(value)

    def found(self, layer: str) -> tuple[Firing, Tensor] | None:
        """The activation that follows every call of a layer, and the first call's units behind it; None if there is none."""
        paths = [value.path() for value in self.outputs.get(layer, ())]
        first = paths[0] if paths else None
        if first is None or any(path is None or path[0] != first[0] for path in paths):
            return None
        return Firing(tuple(first[0])), first[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        inside = [each for arg in args for each in (arg if isinstance(arg, (list, tuple)) else [arg])]
        tensors = [each for each in (*inside, *kwargs.values()) if isinstance(each, Tensor)]
        found = func(*args, **kwargs)
        name, out = func.overloadpacket.__name__, place_of(found) if isinstance(found, Tensor) else None
        is_alias = bool(tensors) and out == place_of(tensors[0]) and not name.endswith("_")
        if is_alias or name in _IGNORED:
            return found
        read = {id(value): value for each in tensors if (value := self.values.get(place_of(each))) is not None}
        for value in read.values():
            self._read(value, name, func, args, kwargs, found)
        self.last = name.removesuffix("_"), out
        return found

    def _read(self, value: _Value, name: str, func: Any, args: tuple, kwargs: dict[str, Any], found: Any) -> None:
        value.readers += 1
        if name.endswith("_"):  # in place: whoever reads this address later reads the result
            self.values.pop(place_of(value.tensor))
        out = found if isinstance(found, Tensor) else found[0] if isinstance(found, (tuple, list)) and found else None
        step = self._step(name.removesuffix("_"), func._overloadname, args, kwargs)
        if value.readers > 1 or step is None or not isinstance(out, Tensor) or place_of(args[0]) != place_of(value.tensor):
            return
        value.step, value.result = step, _Value(out)
        if step.operation in _BETWEEN:
            self.values[place_of(out)] = value.result

    def _places(self) -> dict[Any, tuple[str, torch.Size]]:
        every = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {place_of(tensor)[0]: (name, tensor.shape) for name, tensor in every if not is_part(tensor)}

    def _step(self, operation: str, overload: str, args: tuple, kwargs: dict[str, Any]) -> Step | None:
        """An operation of one value that keeps units apart; None for any other, and for tensors that the model does not store."""
        if operation not in _ACTIVATIONS + _BETWEEN or any(isinstance(value, Tensor) for value in kwargs.values()):
            return None
        own: list[Any] = []
        places = self._places() if self.moves else self.places
        for arg in args[1:]:
            stored = places.get(place_of(arg)[0]) if isinstance(arg, Tensor) else None
            if isinstance(arg, Tensor) and (stored is None or arg.numel() != stored[1].numel()):
                return None
            own.append(arg if stored is None else Stored(stored[0], tuple(arg.shape)))
        return Step(operation, overload, tuple(own), dict(kwargs))


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model under all their names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def place_of(tensor: Tensor) -> Place:
    """Equal for views of one tensor while it is alive. A tensor on the meta device has no address, so its storage is used."""
    place = (tensor.untyped_storage()._cdata, int(tensor.storage_offset())) if tensor.is_meta else tensor.data_ptr()
    return place, tensor.shape
