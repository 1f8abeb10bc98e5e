"""Eval mode without parameter gradients, training mode, and gradients of chosen tensors: restored on exit."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
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
def training_mode(model: nn.Module) -> Iterator[None]:
    """Context in which every submodule is in training mode; modes and the states of random generators are restored on exit.

    Buffers are not: run a copy of a model whose norms must keep their statistics.
    """
    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), np.random.get_state()
    devices = {p.device.index or 0 for p in model.parameters() if p.is_cuda}
    try:
        with torch.random.fork_rng(devices):
            model.train()
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
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
