"""The one place that hooks: looking at what passes, and changing it."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .batch import tensor_of
from .experts import Call, ExpertLayer, Routed
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

    The hidden units of experts pass inside one module: they are made again of what it is called with, an expert's from its own
    tokens, and shown as ``Routed``. At the first call of a module all experts together have to give what it put out.
    """

    def __init__(self, sites: Iterable[Site], see: See, cloned: Iterable[str] = ()):
        self.sites, self.see, self.cloned = list(sites), see, set(cloned)
        self.gate = False
        self.scale = 1.0  # of the gradients, where a trainer divided or multiplied the summed loss
        self.handles: list[Any] = []
        self.fired: Counter[str] = Counter()
        self.checked: set[nn.Module] = set()

    def open(self) -> "Capture":
        mixed: dict[nn.Module, dict[ExpertLayer, list[Site]]] = {}
        for site in self.sites:
            module = site.layer.module  # an input is read before the module can change it in place
            if isinstance(site.layer, ExpertLayer):
                mixed.setdefault(module, {}).setdefault(site.layer, []).append(site)
                continue
            pre = site.port.startswith(("input", "change")) or site.layer.side == "input"
            register = module.register_forward_pre_hook if pre else module.register_forward_hook
            self.handles.append(register(partial(self._hook, site), with_kwargs=True))
        for module, sites in mixed.items():
            self.handles.append(module.register_forward_hook(partial(self._mixed, sites), with_kwargs=True))
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
            if site.port.startswith("change"):
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

    def _mixed(self, sites: Mapping[ExpertLayer, list[Site]], module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if not self.gate:
            return
        name, experts = next((layer.mixture, layer.experts) for layer in sites)
        awaited: dict[ExpertLayer, list[Site]] = {}
        with torch.no_grad():
            call = Call.of(experts, name, args, kwargs)
            if module not in self.checked:
                call.check(name, output)
                self.checked.add(module)
            for layer, own in sites.items():
                self.fired.update(map(str, own))
                awaited[layer] = [site for site in own if "grad" in site.port]
                if shown := [site for site in own if site not in awaited[layer]]:
                    share = call.share(layer.expert)
                    values = Routed(call.hidden(layer.expert, share), share.tokens, call.tokens)
                    for site in shown:
                        self.see(site, values)
        if any(awaited.values()) and torch.is_grad_enabled():
            if not output.requires_grad:
                output.requires_grad_()
            output.register_hook(partial(self._routed_gradient, awaited, call.copy()))

    def _routed_gradient(self, sites: Mapping[ExpertLayer, list[Site]], call: Call, gradient: Tensor) -> None:
        with torch.no_grad():
            for layer, own in sites.items():
                share = call.share(layer.expert)
                slope = call.hidden_gradient(layer.expert, share, gradient) * share.weights * self.scale
                for site in own:  # the units are made again: keeping those of every layer would take more than the model's own
                    times = call.hidden(layer.expert, share) if site.port.startswith("output*grad") else 1
                    self.see(site, Routed(times * slope, share.tokens, call.tokens))


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
