"""Networks that write in place into a tensor that a gradient needs: which module saved it."""

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from nodelens.network.batch import Batch
from nodelens.network.eval_mode import differentiable
from nodelens.network.objective import Objective


class _OverwrittenError(RuntimeError):
    """The path of the module whose code saved the tensor."""


def why_overwritten(model: nn.Module, batch: Batch, objective: Objective, error: Exception) -> str:
    """What is wrong, with the module, where autograd refuses a tensor that was written in place; empty for other errors.

    The batch is run once more, with the version of every saved tensor noted.
    """
    if "modified by an inplace operation" not in str(error):
        return ""
    path, name = _saved_in(model, batch, objective), type(model).__name__
    what = f"{path} ({type(model.get_submodule(path)).__name__})" if path else "its own code"
    before = f"{path} and the layers before it" if path else "the layers before that line"
    return (
        f"{name} overwrites in place what {what} needs for the gradient of the loss, which gets no further: leave out {before} "
        "(layers=), choose metrics without gradients, or write that operation as x = x * 2 instead of x.mul_(2)"
    )


def _saved_in(model: nn.Module, batch: Batch, objective: Objective) -> str:
    """The path of the innermost module whose code saved a tensor that is overwritten later; "" if it is not known."""
    paths = {id(module): path for path, module in model.named_modules()}

    def pack(tensor: Tensor) -> tuple[Tensor, int, str]:
        return tensor, tensor._version, _module_of(sys._getframe(1), paths)

    def unpack(saved: tuple[Tensor, int, str]) -> Tensor:
        tensor, version, path = saved
        if tensor._version != version:
            raise _OverwrittenError(path)
        return tensor

    weights = [p for p in model.parameters() if p.is_floating_point()]
    try:
        with torch.enable_grad(), differentiable(weights), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            objective.summed(objective.run(model, batch), batch.labels).backward()
    except _OverwrittenError as error:
        return str(error)
    except RuntimeError:  # the first error again, seen elsewhere
        pass
    return ""


def _module_of(frame: FrameType | None, paths: Mapping[int, str]) -> str:
    while frame is not None:
        owner: Any = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in paths:
            return paths[id(owner)]
        frame = frame.f_back
    return ""
