"""Masks on the weights of one layer: for good, or until they are taken off again."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nodelens.network.layers import Layer
from nodelens.network.sharded import check_whole

_TENSORS = ("weight", "bias")


class WeightMask(nn.Module):
    """A parametrization: the tensor where the mask is true, else zero. What is masked gets no gradient."""

    mask: Tensor

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, tensor: Tensor) -> Tensor:
        return tensor.where(self.mask, 0)


def apply_mask(module: nn.Module, keep: Tensor) -> None:
    """Masks a layer's weight until ``unmask``; an earlier mask is replaced.

    keep: (units,), which masks the bias too, or the weight's shape; nonzero stays. Raises ValueError for another shape, or a layer
    without weights of its own.
    """
    unmask(module)
    for name, mask in _masks(module, keep).items():
        parametrize.register_parametrization(module, name, WeightMask(mask))


def zero(module: nn.Module, keep: Tensor) -> None:
    """Writes zeros where ``keep`` is zero, for good. Takes and raises what ``apply_mask`` does."""
    masks = _masks(module, keep)
    unmask(module, permanent=True)
    with torch.no_grad():
        for name, mask in masks.items():
            getattr(module, name).masked_fill_(~mask, 0)


def unmask(module: nn.Module, *, permanent: bool = False) -> None:
    """Takes a mask off: the weights are as they were before it, or, ``permanent``, zero where it was."""
    for name in _TENSORS:
        if parametrize.is_parametrized(module, name):
            parametrize.remove_parametrizations(module, name, leave_parametrized=permanent)


def sparsity(module: nn.Module) -> float:
    """Share of the entries of a layer's weight that are zero."""
    weight = Layer(type(module).__name__, module).tensor
    return float("nan") if weight is None else float((weight == 0).double().mean())


def unit_dim(module: nn.Module) -> int:
    """The dimension of a layer's weight along which its units lie. Raises ValueError where there is none."""
    layer: Any = module
    transposed = isinstance(module, nn.modules.conv._ConvNd) and module.transposed
    if transposed and layer.groups > 1:
        raise ValueError(
            f"{type(module).__name__} is a grouped transposed convolution: its units do not lie along one dimension of its weight"
        )
    return 1 if transposed or hasattr(module, "nf") else 0


def _masks(module: nn.Module, keep: Tensor) -> dict[str, Tensor]:
    """{tensor: mask of its shape}."""
    layer: Any = module
    check_whole("a mask", module)
    if Layer(type(module).__name__, module).tensor is None:
        raise ValueError(f"{type(module).__name__} has no weights of its own: mask a Linear layer or a convolution")
    weight, keep = layer.weight, keep.to(layer.weight.device) != 0
    if keep.shape == weight.shape:
        return {"weight": keep}
    dim = unit_dim(module)
    if keep.shape != (weight.shape[dim],):
        raise ValueError(
            f"the mask is {tuple(keep.shape)}: give ({weight.shape[dim]},), one value per unit, or {tuple(weight.shape)}"
        )
    found = {"weight": keep.reshape([-1 if k == dim else 1 for k in range(weight.ndim)]).expand_as(weight)}
    return found if layer.bias is None else found | {"bias": keep}
