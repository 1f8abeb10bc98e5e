"""The one place that hooks: looking at what passes, and changing it."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from .batch import read_of, tensor_of
from .changed import Change, announce, before_observers, changed_output, changed_read
from .experts import Call, ExpertLayer, Experts
from .group_layer import GroupLayer, Member, UnitValues
from .layers import ASSOCIATION
from .sites import Awaited, InMixture, Site
from .traced import Traced

See = Callable[[Site, Any], None]


class Capture(AbstractContextManager["Capture"]):
    """Calls ``see(site, tensor)`` for what passes at each site while it is open and the gate is up.

    ``grad`` shows the gradient of the units during the backward pass, ``output*grad`` its product with them, ``weight*grad`` input,
    output and gradient; ``change`` what the weights' change since the start puts out; ``association`` the place in the graph, as
    ``Traced``. ``cloned`` names the layers whose output a later operation overwrites in place.

    A pruning group shows ``UnitValues``: ``output*grad`` where its units are read, each reader's own share of the gradient;
    ``made*grad`` where they are made; ``maps`` what its first two-dimensional convolution reads; ``load`` which tokens go to
    whole experts.

    ``recomputing`` is set during the backward pass, in which checkpointed modules run again: the first run of a re-entrant
    checkpoint records no gradients, the second does. ``arrived`` says for each awaited gradient whether it has come.
    ``shares``: ``output*grad`` of a layer's input is the layer's own share, too, not that of all layers that read the tensor.

    The hidden units of experts pass inside one module: they are made again of what it is called with, an expert's from its own
    tokens, and shown as ``Routed``. At the first call of a module all experts together have to give what it put out.
    """

    def __init__(self, sites: Iterable[Site], see: See, cloned: Iterable[str] = (), shares: bool = False):
        self.sites, self.see, self.cloned, self.shares = list(sites), see, set(cloned), shares
        self.gate = self.recomputing = False
        self.arrived: dict[Awaited, bool] = {}
        self.recorded: set[Awaited] = set()  # in the forward pass: a recomputation does not record them again
        self.scale = 1.0  # of the gradients, where a trainer divided or multiplied the summed loss
        self.handles: list[Any] = []
        self.fired: Counter[str] = Counter()
        self.checked: set[nn.Module] = set()

    def open(self) -> "Capture":
        mixed: dict[nn.Module, list[InMixture]] = {}
        for site in self.sites:
            module = site.layer.module  # an input is read before the module can change it in place
            if isinstance(site.layer, GroupLayer):
                self._open_group(site, site.layer, mixed)
                continue
            if isinstance(site.layer, ExpertLayer):
                mixed.setdefault(module, []).append(InMixture(site, site.layer))
                continue
            pre = site.port.startswith(("input", "change")) or site.layer.side == "input"
            register = module.register_forward_pre_hook if pre else module.register_forward_hook
            self.handles.append(register(partial(self._hook, site), with_kwargs=True))
        for module, sites in mixed.items():
            self.handles.append(module.register_forward_hook(partial(self._mixed, sites), with_kwargs=True))
        return self

    def _open_group(self, site: Site, layer: GroupLayer, mixed: dict[nn.Module, list["InMixture"]]) -> None:
        """Registers what shows a pruning group."""
        if layer.group.router is not None:
            module = layer.makers[0].layer.module
            mixed.setdefault(module, []).append(InMixture(site, None))
            return
        image = layer.image_reader if site.port == "maps" else None
        members = [image] if image else layer.makers if site.port.startswith("made") else layer.readers
        for member in members:
            module, own = member.layer.module, partial(self._member, site, member)
            if isinstance(member.layer, ExpertLayer):
                mixed.setdefault(module, []).append(InMixture(site, member.layer, member))
            elif member.piece.role == "consumer":
                self.handles.append(module.register_forward_pre_hook(own, with_kwargs=True))
            else:
                self.handles.append(module.register_forward_hook(own, with_kwargs=True))

    def _member(self, site: Site, member: Member, module: nn.Module, args: tuple, kwargs: dict, output: Any = None) -> Any:
        """Shows what one weight of a group reads or puts out; a reader reads a tensor of its own, whose gradient is its share."""
        if not self._watching(site):
            return None
        tensor = tensor_of(read_of(args, kwargs) if output is None else output)
        assert tensor is not None
        self.fired[str(site)] += 1
        if site.port == "maps":
            self.see(site, tensor.detach())
            return None
        if not self._await(awaited := Awaited(site, member.layer)):
            return None
        value = tensor.detach().clone() if member.layer.name in self.cloned else tensor.detach()
        if output is not None:
            self._on_gradient(awaited, tensor, partial(self._unit_gradient, site, member, value))
            return None
        share = _own(tensor)
        self._on_gradient(awaited, share, partial(self._unit_gradient, site, member, value))
        return changed_read(lambda read: share, module, args, kwargs)

    def _watching(self, site: Site) -> bool:
        return self.gate or (self.recomputing and "grad" in site.port)

    def _await(self, awaited: Awaited) -> bool:
        """Whether gradients are recorded, so that one can arrive."""
        self.arrived.setdefault(awaited, False)
        if self.gate and torch.is_grad_enabled():
            self.recorded.add(awaited)
        return torch.is_grad_enabled()

    def _on_gradient(self, awaited: Awaited, tensor: Tensor, see: Callable[[Tensor], None]) -> None:
        """Calls ``see(gradient)`` once in the backward pass, also where a checkpoint runs the module a second time."""
        on_gradient(tensor, (lambda gradient: None) if self.recomputing and awaited in self.recorded else see)

    def _unit_gradient(self, site: Site, member: Member, value: Tensor, gradient: Tensor) -> None:
        self.arrived[Awaited(site, member.layer)] = True
        with torch.no_grad():
            self.see(site, UnitValues(member, self._product(value, gradient)))

    def _product(self, value: Tensor, gradient: Tensor) -> Tensor:
        """Unit x gradient of the summed loss, in float32 or wider: the first-order change of the loss when the unit goes."""
        wide = torch.promote_types(value.dtype, torch.float32)
        product = value.to(wide) * gradient.to(wide)
        return product if self.scale == 1.0 else product * self.scale

    @contextmanager
    def dropping(self) -> Iterator[None]:
        """Inside, hooks do what they do elsewhere, and what they show is dropped."""
        see, self.see = self.see, lambda site, captured: None
        try:
            yield
        finally:
            self.see = see

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.gate = self.recomputing = False

    def __enter__(self) -> "Capture":
        return self.open()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _hook(self, site: Site, module: nn.Module, args: tuple, kwargs: dict, output: Any = None) -> Any:
        if not self._watching(site):
            return None
        seen = read_of(args, kwargs) if output is None else output
        tensor = tensor_of(seen)
        if tensor is None:
            raise ValueError(f"{site} shows {type(seen).__name__} without a tensor: name a module inside it")
        self.fired[str(site)] += 1
        if site.port.startswith(ASSOCIATION):
            return self.see(site, Traced.of(tensor))
        if "grad" in site.port:
            if not self._await(Awaited(site, site.layer)):
                return None
            read = _own(tensor) if self.shares and output is None and site.port.startswith("output") else tensor
            self._await_gradient(site, read, args)
            return None if read is tensor else changed_read(lambda _: read, module, args, kwargs)
        with torch.no_grad():
            if site.port.startswith("change"):
                tensor = site.layer.apply(tensor, site.layer.tensor - site.layer.start)  # type: ignore[operator]
            self.see(site, tensor.detach())
        return None

    def _await_gradient(self, site: Site, tensor: Tensor, args: tuple) -> None:
        value = tensor.detach().clone() if site.layer.name in self.cloned else tensor.detach()
        read = tensor_of(args) if site.port.startswith("weight") else None
        see = partial(self._gradient, site, value, None if read is None else read.detach())
        self._on_gradient(Awaited(site, site.layer), tensor, see)

    def _gradient(self, site: Site, value: Tensor, read: Tensor | None, gradient: Tensor) -> None:
        self.arrived[Awaited(site, site.layer)] = True
        with torch.no_grad():
            if site.port.startswith("output*grad"):
                self.see(site, self._product(value, gradient))
                return
            gradient = gradient if self.scale == 1.0 else gradient * self.scale
            self.see(site, gradient if read is None else (read, value, gradient))

    def _mixed(self, every: Sequence["InMixture"], module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        sites = [each for each in every if self._watching(each.site)]
        if not sites:
            return
        name, experts = sites[0].mixture, Experts.of(module)
        assert experts is not None
        with torch.no_grad():
            call = Call.of(experts, name, args, kwargs)
            if module not in self.checked:
                call.check(name, output)
                self.checked.add(module)
            for each in sites:
                self.fired[str(each.site)] += 1
                if "grad" not in each.site.port:
                    self.see(each.site, each.values(call))
        awaited = [each for each in sites if "grad" in each.site.port and self._await(each.awaited)]
        if awaited:
            self._on_gradient(awaited[0].awaited, output, partial(self._routed_gradient, awaited, call.copy()))

    def _routed_gradient(self, sites: Sequence["InMixture"], call: Call, gradient: Tensor) -> None:
        with torch.no_grad():
            self.arrived |= {each.awaited: True for each in sites}
            for each in sites:  # the units are made again: keeping those of every layer would take more than the model's own
                self.see(each.site, each.slopes(call, gradient * self.scale))


def _own(tensor: Tensor) -> Tensor:
    """The tensor as one of its own, whose gradient is only that of what reads it."""
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach()


def on_gradient(tensor: Tensor, see: Callable[[Tensor], None]) -> None:
    """Calls ``see(gradient)`` in the backward pass; where the graph begins at the tensor, it is made to take a gradient."""
    if not tensor.requires_grad:
        tensor.requires_grad_()
    tensor.register_hook(see)


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


@contextmanager
def entered(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Inside, the last entry of ``stack`` is the path of the module that runs, and those before it are of the modules around."""
    paths = {id(module): path for path, module in model.named_modules()}

    def enter(module: nn.Module, args: tuple) -> None:
        stack.append(paths.get(id(module), stack[-1]))

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        stack.pop()

    before = nn.modules.module.register_module_forward_pre_hook(enter)
    after = nn.modules.module.register_module_forward_hook(leave, always_call=True)
    with before, after:
        yield


@contextmanager
def announced(modules: Iterable[nn.Module], see: Callable[[nn.Module, tuple, dict], None]) -> Iterator[None]:
    """Inside, ``see(module, args, kwargs)`` is called before each call of the modules, and before their edits."""
    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_pre_hook(partial(announce, see), prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def edit(outputs: Mapping[nn.Module, Change], inputs: Mapping[nn.Module, Change] | None = None) -> Iterator[None]:
    """Inside, what each module puts out, or reads, passes through its function first, in the container it came in.

    Observers see the edited value; of nested contexts, the outer one changes it first. Nothing is written into the model. Functions
    return a new tensor.
    """
    with ExitStack() as stack:
        for module, change in outputs.items():
            handle = module.register_forward_hook(partial(changed_output, change))
            stack.callback(handle.remove)
            before_observers(module._forward_hooks)
        for module, change in (inputs or {}).items():
            handle = module.register_forward_pre_hook(partial(changed_read, change), with_kwargs=True)
            stack.callback(handle.remove)
            before_observers(module._forward_pre_hooks)
        yield


@contextmanager
def parameter_limit(most: int) -> Iterator[None]:
    """Raises ValueError as soon as modules that are built inside have more than ``most`` parameters."""
    numbers = count(1)

    def counted(module: nn.Module, name: str, parameter: Any) -> None:
        if next(numbers) > most:
            raise ValueError(f"it has more than {most} parameters")

    with nn.modules.module.register_module_parameter_registration_hook(counted):
        yield
