"""Eval mode without parameter gradients, restored on exit."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def eval_mode(model: nn.Module, train: bool = False) -> Iterator[None]:
    """Context in which every submodule is in eval mode (unchanged if ``train``) and no parameter requires a gradient.

    On exit, every module and parameter gets its previous flag back.
    """
    modes = [(module, module.training) for module in model.modules()]
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        if not train:
            model.eval()
        for p in trainable:
            p.requires_grad_(False)
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
        for module, training in modes:
            module.training = training


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
