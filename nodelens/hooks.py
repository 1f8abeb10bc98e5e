"""The one place that hooks: looking at what passes, and changing it."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .frame import tensor_of
from .layers import Layer


class Site(NamedTuple):
    """Where rows are read: a layer's port."""

    layer: Layer
    port: str

    def __str__(self) -> str:
        return f"{self.layer.name}.{self.port}"


See = Callable[[Site, Any], None]


class Capture(AbstractContextManager["Capture"]):
    """Calls ``see(site, tensor)`` for what passes at each site while it is open and the gate is up.

    ``grad`` shows the gradient of the units during the backward pass, ``output*grad`` its product with them, ``weight*grad``
    input, output and gradient; ``change`` what the weights' change since the start puts out. ``cloned`` names the layers whose
    output a later operation overwrites in place.
    """

    def __init__(self, sites: Iterable[Site], see: See, cloned: Iterable[str] = ()):
        self.sites, self.see, self.cloned = list(sites), see, set(cloned)
        self.gate = False
        self.scale = 1.0  # of the gradients, where a trainer divided or multiplied the summed loss
        self.handles: list[Any] = []
        self.fired: Counter[str] = Counter()

    def open(self) -> "Capture":
        for site in self.sites:
            module = site.layer.module  # an input is read before the module can change it in place
            pre = site.port in ("input", "change") or site.layer.side == "input"
            register = module.register_forward_pre_hook if pre else module.register_forward_hook
            self.handles.append(register(partial(self._hook, site), with_kwargs=True))
        return self

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.gate = False

    def __enter__(self) -> "Capture":
        return self.open()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _hook(self, site: Site, module: nn.Module, args: tuple, kwargs: dict, output: Any = None) -> None:
        if not self.gate:
            return
        seen = (args or tuple(kwargs.values())) if output is None else output
        tensor = tensor_of(seen)
        if tensor is None:
            raise ValueError(f"{site} shows {type(seen).__name__} without a tensor: name a module inside it")
        self.fired[str(site)] += 1
        if "grad" in site.port:
            if torch.is_grad_enabled():
                self._await_gradient(site, tensor, args)
            return
        with torch.no_grad():
            if site.port == "change":
                self.gate = False  # the module's own hooks
                tensor = site.layer.apply(tensor, site.layer.tensor - site.layer.start)  # type: ignore[operator]
                self.gate = True
            self.see(site, tensor.detach())

    def _await_gradient(self, site: Site, tensor: Tensor, args: tuple) -> None:
        if not tensor.requires_grad:  # the graph begins here: nothing before a first layer is differentiated
            tensor.requires_grad_()
        value = tensor.detach().clone() if site.layer.name in self.cloned else tensor.detach()
        read = tensor_of(args) if site.port.startswith("weight") else None
        tensor.register_hook(partial(self._gradient, site, value, None if read is None else read.detach()))

    def _gradient(self, site: Site, value: Tensor, read: Tensor | None, gradient: Tensor) -> None:
        with torch.no_grad():
            gradient = gradient if self.scale == 1.0 else gradient * self.scale
            if site.port.startswith("output*grad"):
                self.see(site, value * gradient)
            else:
                self.see(site, gradient if read is None else (read, value, gradient))


@contextmanager
def observed(modules: Iterable[nn.Module], see: Callable[[nn.Module, tuple, dict, Any], None]) -> Iterator[None]:
    """Inside, ``see(module, args, kwargs, output)`` is called for each call of the modules."""
    handles = [module.register_forward_hook(partial(_shown, see), with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shown(see: Callable, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    see(module, args, kwargs, output)


Edit = Callable[[Tensor], Tensor]


@contextmanager
def edit(outputs: Mapping[nn.Module, Edit], inputs: Mapping[nn.Module, Edit] | None = None) -> Iterator[None]:
    """Inside, what each module puts out, or reads, passes through its function first, in the container it came in.

    Observers see the edited value; nothing is written into the model. Functions return a new tensor.
    """
    handles = [module.register_forward_hook(partial(_replace, change), prepend=True) for module, change in outputs.items()]
    for module, change in (inputs or {}).items():
        handles.append(module.register_forward_pre_hook(partial(_replace_read, change), prepend=True, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _replace_read(change: Edit, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if args:
        return _replace(change, module, (), args), kwargs
    return args, _replace(change, module, (), dict(kwargs))


def _replace(change: Edit, module: nn.Module, args: tuple, output: Any) -> Any:
    if isinstance(output, Tensor):
        return change(output)
    old = tensor_of(output)
    if old is None:
        raise ValueError(f"{type(module).__name__} shows {type(output).__name__} without a tensor: nothing to edit")
    if isinstance(output, tuple) and not hasattr(output, "_fields"):
        return tuple(change(v) if v is old else v for v in output)
    for key, v in output.items():
        if v is old:
            output[key] = change(v)
    return output
