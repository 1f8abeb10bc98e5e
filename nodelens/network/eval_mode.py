"""A model as it is while it is looked at: eval mode, no gradients of parameters; and as it was, afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module, train: bool = False) -> Iterator[None]:
    """Inside, every submodule is in eval mode (or left alone, ``train``) and no parameter takes a gradient.

    Afterwards each has its own flag back.
    """
    modes = [(module, module.training) for module in model.modules()]
    taking = [p for p in model.parameters() if p.requires_grad]
    try:
        if not train:
            model.eval()
        for p in taking:
            p.requires_grad_(False)
        yield
    finally:
        for p in taking:
            p.requires_grad_(True)
        for module, training in modes:
            module.training = training
