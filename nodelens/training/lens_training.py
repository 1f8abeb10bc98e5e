"""What the training of lenses shares: Lightning without its output, Adam, and the divergence that is minimised."""

import logging
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from nodelens.messages import LIGHTNING_HINTS
from nodelens.statistics.processes import world
from nodelens.statistics.seeding import seeded


def fit_lens(module: LightningModule, data: Iterable[Any], epochs: int, device: torch.device, *key: int | str) -> None:
    """Trains a module on one device, without files and progress bars. key: a seed, and the name of the analysis.

    Raises ValueError in a run of several processes, each of which would train a module of its own.
    """
    if world()[1] > 1:
        raise ValueError(
            f"{key[-1]} is trained by one process, and this run has {world()[1]}: train it in a run of one, with "
            "save_to=, and give load_from= here"
        )
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    with warnings.catch_warnings(), seeded(*key):
        for hint in (*LIGHTNING_HINTS, ".*does not have many workers.*"):
            warnings.filterwarnings("ignore", message=hint)
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="cpu" if device.type == "cpu" else device.type,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, train_dataloaders=_Batches(data))


def falling_adam(parameters: Iterable[Tensor], lr: float, steps: int | None) -> Any:
    """Adam, with a rate that falls linearly to 0 where the number of steps is known."""
    optimizer = torch.optim.Adam(parameters, lr)
    fall = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0 if not steps else max(0.0, 1 - k / steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": fall, "interval": "step"}}


def summed_kl(final: Tensor, logs: Tensor) -> Tensor:
    """The sum of KL(model || lens) over rows: final logits (n, V), log probabilities of the lens (n, V)."""
    own = final.float().log_softmax(1)
    p = own.exp()
    return torch.where(p > 0, p * (own - logs), 0).sum()


class _Batches:
    """Data as Lightning reads them: any iterable that can be read again."""

    def __init__(self, data: Iterable[Any]):
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)
