"""Changing the tensor that a module reads or puts out, in the container it came in."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .batch import read_of, tensor_of

Change = Callable[[Tensor], Tensor]


def changed_read(change: Change, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A module's arguments with the tensor that it reads changed."""
    if read_of(args, kwargs) is args:
        return _with_changed_tensor(change, module, args)[0], kwargs
    return args, _with_changed_tensor(change, module, dict(kwargs))[0]


def changed_output(change: Change, module: nn.Module, args: tuple, output: Any) -> Any:
    """An output with its tensor changed; the container is a copy. Raises ValueError where there is no tensor.

    The last states that an LSTM, GRU or RNN returns besides are those of the changed output.
    """
    changed, new = _with_changed_tensor(change, module, output)
    if isinstance(module, nn.RNNBase) and isinstance(output[0], Tensor):
        return new, _last_states(module, new, output[1])
    return changed


def _with_changed_tensor(change: Change, module: nn.Module, shown: Any) -> tuple[Any, Tensor]:
    """What a module reads or returns with its tensor changed, and that tensor."""
    if isinstance(shown, Tensor):
        new = change(shown)
        return new, new
    old = tensor_of(shown)
    if old is None:
        raise ValueError(f"{type(module).__name__} shows {type(shown).__name__} without a tensor: nothing to edit")
    new = change(old)
    if isinstance(shown, (tuple, list)):
        items = [new if v is old else v for v in shown]
        return type(shown)(*items) if hasattr(shown, "_fields") else type(shown)(items), new
    changed = copy.copy(shown)
    if not hasattr(shown, "items"):  # an object with a field of logits
        changed.logits = new
        return changed, new
    for key in [key for key, v in shown.items() if v is old]:
        changed[key] = new
    return changed, new


def _last_states(module: nn.RNNBase, output: Tensor, states: Any) -> Any:
    """The states that a recurrent module returns, with those of its last layer as in its output; a packed output has no steps."""
    if output.ndim != 3:
        return states
    h = states[0] if isinstance(states, tuple) else states
    steps, width = output.transpose(0, 1) if module.batch_first else output, h.shape[-1]
    ends = [steps[-1, :, :width], *([steps[0, :, width:]] if module.bidirectional else [])]  # backwards, the first step is the last
    h = torch.cat([h[: -len(ends)], torch.stack(ends)])
    return (h, *states[1:]) if isinstance(states, tuple) else h


def announce(see: Callable[[nn.Module, tuple, dict], None], module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Shows a module's arguments before they are changed."""
    see(module, args, kwargs)


def before_observers(hooks: dict[int, Any]) -> None:
    """Moves the hooks of this file before all others; within both, those registered first stay first."""
    first = (announce, changed_read, changed_output)
    for key in [key for key, hook in hooks.items() if getattr(hook, "func", None) not in first]:
        hooks[key] = hooks.pop(key)
