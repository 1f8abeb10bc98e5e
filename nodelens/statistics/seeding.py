"""Seeds: every random draw is a function of a key such as (seed, epoch, batch), and global random states are given back."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*key: int | str) -> int:
    """A seed, in [0, 2**63), that is a function of numbers and words. Keys that differ give unrelated seeds.

    >>> seed_of(0, "epoch", 1) == seed_of(0, "epoch", 1), seed_of(0, "epoch", 1) == seed_of(1, "epoch", 0)
    (True, False)
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def seed_all(seed: int) -> None:
    """Seeds the global generators of torch (the CPU, and CUDA devices in use), NumPy and Python."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # otherwise the call would be queued, and take effect after the caller's own seed
        torch.cuda.manual_seed_all(seed)


@contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Draws from global generators are a function of the key inside the block, and continue afterwards as if it had not been."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        seed_all(seed_of(*key))
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
