"""The loss and accuracy of each epoch, kept in a file of the run, with any logger and without one."""

from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch import Callback, LightningModule, Trainer

from nodelens.results.files import write
from nodelens.results.training_history import read_history


class History(Callback):
    """Writes one row per epoch: what the module logs under ``train/`` and ``val/``, as means over the epoch and all processes.

    Where an epoch is validated several times, its last validation counts. ``batches`` says how many batches of this process the
    means under ``train/`` are over: fewer than usual in an epoch within which training was resumed, which continues the file.
    """

    def __init__(self, path: Path):
        self.path, self.rows = path, pd.DataFrame()
        self.validated: dict[str, float] = {}
        self.batches = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        known = read_history(self.path)
        self.rows = known[known.index < trainer.current_epoch]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.batches = 0  # this hook is not called where an epoch continues

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches += 1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.validated = _logged(trainer, "val/")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = _logged(trainer, "train/") | self.validated  # means over processes: each of them has to ask for them
        self.validated = {}
        row = pd.DataFrame([found | {"batches": self.batches}], index=pd.Index([trainer.current_epoch], name="epoch"))
        self.rows = pd.concat([self.rows, row])
        if trainer.is_global_zero and found:
            write(self.path, self.rows.to_csv)


def _logged(trainer: Trainer, prefix: str) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}
