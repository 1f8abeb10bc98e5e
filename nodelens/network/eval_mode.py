"""Eval mode without parameter gradients, restored on exit."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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
