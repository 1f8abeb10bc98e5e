"""Trainings on digits that are interrupted and resumed."""

import os
import random
from functools import partial

import lightning
import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nodelens.data import Digits
from nodelens.data.batch import ImageBatch
from nodelens.data.source import ArraySource
from nodelens.models.classifier import Classifier
from nodelens.training.checkpoints import write_atomically
from nodelens.training.resume import SeededSteps

BATCHES = 8  # of an epoch


class Moving(ArraySource):
    """Images with noise from each of the global generators."""

    def fetch(self, ids, convert):
        return super().fetch(ids, convert) + torch.randn(1) * random.random() * np.random.rand()


class MovingDigits(Digits):
    def read(self):
        source = super().read()
        return Moving(source.x, source.labels)


class PlainLoader(MovingDigits):
    """A loader that shuffles with the global generator, as users write it."""

    def train_dataloader(self):
        source, ids = self._ready(), self._ids("train")
        data = TensorDataset(source.x[ids], source.labels[ids], ids)
        return DataLoader(data, batch_size=100, shuffle=True, num_workers=self.workers, collate_fn=_noisy)


def _noisy(samples):
    x, y, ids = (torch.stack(part) for part in zip(*samples, strict=True))
    return ImageBatch(x + torch.randn(1) * random.random() * np.random.rand(), y, ids)


class StopHereError(Exception):
    """In place of a kill."""


class Interrupt(Callback):
    """Stops after a number of steps, or sends a signal to its own process at its start; notes what was read."""

    def __init__(self, step=None, signum=None):
        self.step, self.signum, self.seen = step, signum, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((trainer.current_epoch, batch_idx, tuple(batch.ids.tolist()), float(batch.x.sum())))
        if self.signum and trainer.global_step == self.step:
            os.kill(os.getpid(), self.signum)

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step and not self.signum:
            raise StopHereError


def fit(folder, step=None, resume=False, data=MovingDigits, workers=0, keep=None, more=(), scheduler=None, signum=None, **options):
    """The weights after training, or None if it was interrupted, and what was read.

    resume: True for last.ckpt, or the checkpoint.
    keep: the options of a ModelCheckpoint, or a callback that saves last.ckpt. more: other callbacks.
    """
    lightning.seed_everything(0, verbose=False)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.3), nn.ReLU(), nn.Linear(32, 10))
    scheduler = scheduler or partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.7)
    module = Classifier(net, partial(torch.optim.AdamW, lr=1e-2), scheduler)
    if not isinstance(keep, Callback):
        keep = ModelCheckpoint(folder, filename="x", save_last=True, enable_version_counter=False, **(keep or {}))
    notes = Interrupt(step, signum)
    trainer = Trainer(
        **{"max_epochs": 3, "accelerator": "cpu", "logger": False, "num_sanity_val_steps": 0} | options,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SeededSteps(0), *more, keep, notes],
    )
    write_atomically(trainer)
    last = folder / "last.ckpt" if resume is True else resume
    start = str(last) if last and last.is_file() else None
    try:
        trainer.fit(module, datamodule=data(batch_size=100, workers=workers), ckpt_path=start, weights_only=True)
    except (StopHereError, SystemExit):
        return None, notes.seen
    return torch.cat([p.detach().flatten() for p in net.parameters()]), notes.seen
