"""Changing the tensor that a module reads or puts out, in the container it came in."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .batch import tensor_of

Edit = Callable[[Tensor], Tensor]


def changed_read(change: Edit, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A module's arguments with the tensor that it reads changed."""
    if args:
        return changed_output(change, module, (), args), kwargs
    return args, changed_output(change, module, (), dict(kwargs))


def changed_output(change: Edit, module: nn.Module, args: tuple, output: Any) -> Any:
    """An output with its tensor changed. Raises ValueError where there is none."""
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
