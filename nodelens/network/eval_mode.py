"""Eval mode without parameter gradients, training mode, and gradients of chosen tensors: restored on exit."""

import copy
import random
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .open_attention import opened
from .sharded import reshard

_CONTAINERS = (dict, OrderedDict, set)
_LOCK = threading.RLock()  # hooks, modes of modules, torch's switches and random generators belong to the whole process
_P = ParamSpec("_P")
_T = TypeVar("_T")


def one_at_a_time(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """The function, which waits while another thread is in one of those that are decorated so."""

    @wraps(function)
    def locked(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with _LOCK:
            return function(*args, **kwargs)

    return locked


def uncompiled(model: nn.Module) -> nn.Module:
    """The network inside ``torch.compile``, with its own names of modules; any other network as it is."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) and type(model).__name__ == "OptimizedModule" else model


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Context in which a model that ``torch.compile`` has made runs uncompiled: its graph would not call new hooks."""
    with torch.compiler.set_stance("force_eager") if uncompiled(model) is not model else nullcontext():
        yield


@contextmanager
def eval_mode(model: nn.Module, train: bool = False, as_written: bool = True) -> Iterator[None]:
    """Context in which every submodule is in eval mode (unchanged if ``train``) and no parameter requires a gradient.

    as_written: without compiled graphs and fused kernels of ``nn.TransformerEncoder``, which hooks cannot see into; the kernels
    also put out zeros at padding, as the layers themselves do not. Attention modules call their output projection. Tensors made in
    inference mode, which no gradient can pass, are replaced by copies. On exit, every module and parameter gets its previous flag
    back.
    """
    reshard(model)
    modes = [(module, module.training) for module in model.modules()]
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        if not train:
            model.eval()
        for p in trainable:
            p.requires_grad_(False)
        with _as_written(model) if as_written else nullcontext(), _copies_of_inference_tensors(model):
            yield
    finally:
        reshard(model)
        for p in trainable:
            with torch.inference_mode(p.is_inference()):  # where alone the flag of a tensor made there can be set
                p.requires_grad_(True)
        for module, training in modes:
            module.training = training


@contextmanager
def _copies_of_inference_tensors(model: nn.Module) -> Iterator[None]:
    """Context in which parameters and buffers made in inference mode are copies that autograd can use."""
    copies: dict[int, Tensor] = {}  # by the original, which may have several names
    held: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in model.modules():
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for own in places:
            for name, tensor in own.items():
                if tensor is not None and tensor.is_inference():
                    held.append((own, name, tensor))
                    parameter = isinstance(tensor, nn.Parameter)
                    with torch.inference_mode(False):
                        own_copy = nn.Parameter(tensor.clone(), requires_grad=False) if parameter else tensor.clone()
                    copies.setdefault(id(tensor), own_copy)
    try:
        for own, name, tensor in held:
            own[name] = copies[id(tensor)]
        yield
    finally:
        for own, name, tensor in held:
            own[name] = tensor


@contextmanager
def _as_written(model: nn.Module) -> Iterator[None]:
    """Context in which modules run neither compiled nor fused, and attention modules show their heads."""
    fused = torch.backends.mha.get_fastpath_enabled()
    compiled = "torch._dynamo" in sys.modules  # importing it takes seconds, and nothing is compiled before
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        stance = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with opened(model), stance, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using `torch.compile")  # hooks of the FLOP counter, which would fire twice
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Context in which every submodule is in training mode; modes and the states of random generators are restored on exit.

    Buffers are not: run a copy of a model whose norms must keep their statistics.
    """
    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), np.random.get_state()
    devices = {p.device.index or 0 for p in model.parameters() if p.is_cuda}
    try:
        with torch.random.fork_rng(devices):
            model.train()
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, training in modes:
            module.training = training


def copy_of(model: nn.Module, shared: Iterable[Tensor] = ()) -> nn.Module:
    """A deep copy, also of a model whose modules keep tensors of an earlier pass with their graph, such as recurrent states.

    shared: tensors that are not copied.
    """
    attributes: list[Any] = [
        value for module in model.modules() for own in (vars(module), module._buffers) for value in own.values()
    ]
    states = {id(v): v.detach().clone() for v in _leaves(attributes) if isinstance(v, Tensor) and not v.is_leaf}
    # each module has a dozen empty dictionaries, for hooks, with which deepcopy would spend most of its time
    empty = {id(v): type(v)() for v in attributes if type(v) in _CONTAINERS and not v}
    return copy.deepcopy(model, empty | states | {id(tensor): tensor for tensor in shared})


def _leaves(value: Any) -> Iterator[Any]:
    """The values inside lists, tuples and dictionaries."""
    if isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _leaves(each)
    else:
        yield value


@contextmanager
def differentiable(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Inside, tensors take a gradient in an empty ``.grad``; afterwards flags and gradients are what they were."""
    held = [(t, t.requires_grad, t.grad) for t in tensors]
    try:
        for t, _, _ in held:
            t.requires_grad_(True)
            t.grad = None
        yield
    finally:
        for t, flag, gradient in held:
            t.requires_grad_(flag)
            t.grad = gradient
