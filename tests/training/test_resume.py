"""A training that is interrupted and resumed has the weights of the undisturbed one, to the bit."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from command import command
from interrupted import BATCHES, PlainLoader, fit
from pandas.testing import assert_frame_equal

import nodelens as nl
from nodelens.training.callbacks import Measure
from nodelens.training.resume import SeededSteps

ROOT = Path(__file__).parents[2]
STEPS = {"every_n_train_steps": 1, "save_top_k": -1}
BEST = {"monitor": "val/acc", "mode": "max"}
quiet = pytest.mark.filterwarnings("ignore")  # of Lightning, on workers, intervals and existing folders


@quiet
@pytest.mark.parametrize(
    ("checkpoint", "options", "steps"),
    [
        (STEPS, {}, (8, 9)),
        pytest.param(STEPS, {}, (1, 7, 13), marks=pytest.mark.slow),
        (BEST, {}, (9,)),
        pytest.param(BEST, {}, (5, 23), marks=pytest.mark.slow),
        pytest.param({"save_on_train_epoch_end": True}, {}, (8, 20), marks=pytest.mark.slow),
        pytest.param(BEST, {"val_check_interval": 3}, (5, 12), marks=pytest.mark.slow),
        pytest.param(STEPS, {"accumulate_grad_batches": 3}, (2, 4), marks=pytest.mark.slow),
        (STEPS, {"data": PlainLoader}, (11,)),
        pytest.param(STEPS, {"data": PlainLoader}, (3,), marks=pytest.mark.slow),
        ({"save_on_train_epoch_end": True}, {"data": PlainLoader}, (11,)),
        (STEPS, {"workers": 2}, (11,)),
        pytest.param(STEPS, {"data": PlainLoader, "workers": 2}, (11,), marks=pytest.mark.slow),
    ],
    ids=[
        "steps",
        "other steps",
        "best",
        "best, others",
        "epochs",
        "within epochs",
        "accumulated",
        "plain",
        "plain, early",
        "plain, epochs",
        "workers",
        "plain, workers",
    ],
)
def test_a_resumed_training_equals_the_undisturbed_one(checkpoint, options, steps, tmp_path):
    whole, seen = fit(tmp_path / "whole", keep=checkpoint, **options)
    assert len(seen) == 3 * BATCHES
    assert len({ids for _, _, ids, _ in seen}) == 3 * BATCHES, "another order in each epoch"
    for step in steps:
        folder = tmp_path / f"cut{step}"
        stopped, _ = fit(folder, step, keep=checkpoint, **options)
        assert stopped is None
        resumed, rest = fit(folder, resume=True, keep=checkpoint, **options)
        assert torch.equal(resumed, whole), step
        assert rest == seen[-len(rest) :], "the same samples, transformed alike, from the right one on"
        if checkpoint is STEPS and "accumulate_grad_batches" not in options and step % BATCHES > 1:
            assert len(rest) == 3 * BATCHES - (step - 1), "the checkpoint of step n was interrupted before it was written"


@quiet
def test_without_the_callback_a_resumed_training_ends_elsewhere(tmp_path, monkeypatch):
    """What the test above can see."""
    monkeypatch.setattr(SeededSteps, "_seed", lambda *_: None)
    whole, _ = fit(tmp_path / "whole", keep=STEPS)
    fit(tmp_path / "cut", 11, keep=STEPS)
    assert not torch.equal(fit(tmp_path / "cut", resume=True, keep=STEPS)[0], whole)


def measure(folder):
    metrics = {"mean": nl.get_metric("activation_mean"), "rq": nl.get_metric("rq")}
    return [Measure(metrics, str(folder / "epochs"), on="train")]


@quiet
def test_an_epoch_within_which_a_training_was_resumed_is_measured_whole(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(whole, keep=STEPS, more=measure(whole))
    fit(cut, 11, keep=STEPS, more=measure(cut))
    fit(cut, resume=True, keep=STEPS, more=measure(cut))
    for name in ("units_000", "units_001", "units_002"):
        found, wanted = (pd.read_parquet(run / f"epochs/{name}.parquet") for run in (cut, whole))
        assert_frame_equal(found, wanted, rtol=1e-9)
    samples = [json.loads((run / "epochs/metadata.json").read_text())["samples"] for run in (cut, whole)]
    assert samples == [746, 746]


@quiet
def test_the_sums_of_several_processes_are_not_kept_and_the_epoch_is_left_out_with_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr("nodelens.training.callbacks.world", lambda: (0, 2))
    fit(tmp_path, 11, keep=STEPS, more=measure(tmp_path))
    with pytest.warns(UserWarning, match="no units are written for epoch 1: training was resumed within it"):
        fit(tmp_path, resume=True, keep=STEPS, more=measure(tmp_path))
    assert sorted(p.name for p in (tmp_path / "epochs").glob("units_*")) == ["units_000.parquet", "units_002.parquet"]


@quiet
@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 3])
def test_processes_resume_to_the_bit_too(devices, tmp_path):
    options = {"keep": STEPS, "devices": devices, "strategy": "ddp_fork"}
    whole, _ = fit(tmp_path / "whole", **options)
    fit(tmp_path / "cut", max_steps=4, **options)
    assert torch.equal(fit(tmp_path / "cut", resume=True, **options)[0], whole)


NET = """
from torch import nn

class MyNet(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.3), nn.ReLU(), nn.Linear(32, 10))
"""
TRAIN = ("model.net._target_=resumed_net.MyNet", "trainer.max_epochs=3", "logger=none", "dataset.batch_size=100")
TRAIN += ("callbacks.last.every_n_train_steps=2",)
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
    (quiet_home / "resumed_net.py").write_text(NET)
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
