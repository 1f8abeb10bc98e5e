"""Lightning's Trainer without files, messages and hints, for a training that is a part of another task."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Trainer

from nodelens.messages import LIGHTNING_HINTS


@contextmanager
def quiet_trainer(epochs: int, device: torch.device) -> Iterator[Trainer]:
    """A trainer on one device; inside the block nothing that nobody can act on is said."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for hint in LIGHTNING_HINTS:
            warnings.filterwarnings("ignore", message=hint)
        yield Trainer(
            max_epochs=epochs,
            accelerator=device.type,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
