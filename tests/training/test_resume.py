"""A training that is interrupted and resumed has the weights of the undisturbed one, to the bit."""

import os
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from command import command
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nodelens as nl
from nodelens.data import Digits
from nodelens.data.batch import ImageBatch
from nodelens.data.source import ArraySource
from nodelens.models.classifier import Classifier
from nodelens.training.callbacks import Measure
from nodelens.training.resume import SeededSteps

ROOT = Path(__file__).parents[2]
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
    """Stops after a number of steps; notes what was read."""

    def __init__(self, step=None):
        self.step, self.seen = step, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((trainer.current_epoch, batch_idx, tuple(batch.ids.tolist()), float(batch.x.sum())))

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise StopHereError


def fit(folder, step=None, resume=False, data=MovingDigits, workers=0, checkpoint=None, measure=None, **options):
    """The weights after training, or None if it was interrupted, and what was read."""
    lightning.seed_everything(0, verbose=False)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.3), nn.ReLU(), nn.Linear(32, 10))
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.7)
    module = Classifier(net, partial(torch.optim.AdamW, lr=1e-2), scheduler)
    kept = ModelCheckpoint(folder, filename="x", save_last=True, enable_version_counter=False, **(checkpoint or {}))
    notes = Interrupt(step)
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[SeededSteps(0), kept, *([measure] if measure else []), notes],
        **options,
    )
    last = folder / "last.ckpt"
    start = str(last) if resume and last.is_file() else None
    try:
        trainer.fit(module, datamodule=data(batch_size=100, workers=workers), ckpt_path=start, weights_only=True)
    except StopHereError:
        return None, notes.seen
    return torch.cat([p.detach().flatten() for p in net.parameters()]), notes.seen


STEPS = {"every_n_train_steps": 1, "save_top_k": -1}
BEST = {"monitor": "val/acc", "mode": "max"}
quiet = pytest.mark.filterwarnings("ignore")  # of Lightning, on workers, intervals and existing folders


@quiet
@pytest.mark.parametrize(
    ("checkpoint", "options", "steps"),
    [
        (STEPS, {}, (1, 7, 8, 9, 13)),
        (BEST, {}, (5, 9, 23)),
        ({"save_on_train_epoch_end": True}, {}, (8, 20)),
        (BEST, {"val_check_interval": 3}, (5, 12)),
        (STEPS, {"accumulate_grad_batches": 3}, (2, 4)),
        (STEPS, {"data": PlainLoader}, (3, 11)),
        ({"save_on_train_epoch_end": True}, {"data": PlainLoader}, (11,)),
        (STEPS, {"workers": 2}, (11,)),
        (STEPS, {"data": PlainLoader, "workers": 2}, (11,)),
    ],
    ids=["steps", "best", "epochs", "within epochs", "accumulated", "plain", "plain, epochs", "workers", "plain, workers"],
)
def test_a_resumed_training_equals_the_undisturbed_one(checkpoint, options, steps, tmp_path):
    whole, seen = fit(tmp_path / "whole", checkpoint=checkpoint, **options)
    assert len(seen) == 3 * BATCHES
    assert len({ids for _, _, ids, _ in seen}) == 3 * BATCHES, "another order in each epoch"
    for step in steps:
        folder = tmp_path / f"cut{step}"
        stopped, _ = fit(folder, step, checkpoint=checkpoint, **options)
        assert stopped is None
        resumed, rest = fit(folder, resume=True, checkpoint=checkpoint, **options)
        assert torch.equal(resumed, whole), step
        assert rest == seen[-len(rest) :], "the same samples, transformed alike, from the right one on"
        if checkpoint is STEPS and "accumulate_grad_batches" not in options and step % BATCHES > 1:
            assert len(rest) == 3 * BATCHES - (step - 1), "the checkpoint of step n was interrupted before it was written"


@quiet
def test_without_the_callback_a_resumed_training_ends_elsewhere(tmp_path, monkeypatch):
    """What the test above can see."""
    monkeypatch.setattr(SeededSteps, "_seed", lambda *_: None)
    whole, _ = fit(tmp_path / "whole", checkpoint=STEPS)
    fit(tmp_path / "cut", 11, checkpoint=STEPS)
    assert not torch.equal(fit(tmp_path / "cut", resume=True, checkpoint=STEPS)[0], whole)


@quiet
def test_an_epoch_that_was_measured_in_part_is_left_out_with_a_warning(tmp_path):
    def measure():
        return Measure({"mean": nl.get_metric("activation_mean")}, str(tmp_path / "epochs"), on="train")

    fit(tmp_path / "cut", 11, checkpoint=STEPS, measure=measure())
    with pytest.warns(UserWarning, match="no units are written for epoch 1: training was resumed within it"):
        fit(tmp_path / "cut", resume=True, checkpoint=STEPS, measure=measure())
    assert sorted(p.name for p in (tmp_path / "epochs").glob("units_*")) == ["units_000.parquet", "units_002.parquet"]


@quiet
@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 3])
def test_processes_resume_to_the_bit_too(devices, tmp_path):
    options = {"checkpoint": STEPS, "devices": devices, "strategy": "ddp_fork"}
    whole, _ = fit(tmp_path / "whole", **options)
    fit(tmp_path / "cut", max_steps=4, **options)
    assert torch.equal(fit(tmp_path / "cut", resume=True, **options)[0], whole)


NET = """
from torch import nn

class MyNet(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.3), nn.ReLU(), nn.Linear(32, 10))
"""
TRAIN = ("model.net._target_=my_net.MyNet", "trainer.max_epochs=3", "logger=none", "dataset.batch_size=100")
TRAIN += ("+callbacks.last.every_n_train_steps=2",)
KILL = """
import os, signal
from nodelens.models.classifier import Classifier
step, train = 0, Classifier.training_step
def training_step(self, *rest):
    global step
    step += 1
    if step == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return train(self, *rest)
Classifier.training_step = training_step
from nodelens.app import cli
cli.train()
"""


def weights(run):
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("at", random.Random(0).sample(range(2, 3 * BATCHES), 3))
def test_a_training_killed_at_a_random_step_ends_with_the_weights_of_the_undisturbed_one(at, quiet_home):
    (quiet_home / "my_net.py").write_text(NET)
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{quiet_home}", "OMP_NUM_THREADS": "1"}
    words = [*TRAIN, "hydra.run.dir=cut"]
    killed = subprocess.run(
        [sys.executable, "-c", KILL.format(at=at), *words], env=env, check=False, capture_output=True, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    for run in ("cut", "whole"):
        ended = command("train", *TRAIN, f"hydra.run.dir={run}")
        assert ended.code == 0, ended.err
    cut, whole = weights(quiet_home / "cut"), weights(quiet_home / "whole")
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
