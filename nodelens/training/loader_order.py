"""What determines the order in which a loader reads its samples: samplers with seed and epoch, and generators."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def set_epoch(loader: Any, epoch: int) -> None:
    """Sets the epoch of every part of a loader that has one."""
    for part in _parts(loader):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


@contextmanager
def seeded_order(loader: Any, seed: int) -> Iterator[None]:
    """Inside the block a shuffled loader reads in an order that follows the seed; afterwards it continues as before.

    A loader that shuffles with the global generator follows that one.
    """
    parts = _parts(loader)
    samplers = [part for part in parts if hasattr(part, "set_epoch") and hasattr(part, "epoch") and hasattr(part, "seed")]
    samplers = [sampler for sampler in samplers if sampler.seed is not None]  # None: a stream that is not shuffled
    before = [(sampler.seed, sampler.epoch) for sampler in samplers]
    generators = [g for part in parts if isinstance(g := getattr(part, "generator", None), torch.Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        for sampler in samplers:
            sampler.seed = seed
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for sampler, (own, epoch) in zip(samplers, before, strict=True):
            sampler.seed, sampler.epoch = own, epoch
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _parts(loader: Any) -> list[Any]:
    """The loader, its data set and its samplers, each once."""
    batches = getattr(loader, "batch_sampler", None)
    found = [loader, getattr(loader, "dataset", None), getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]
    return list({id(part): part for part in found if part is not None}.values())
