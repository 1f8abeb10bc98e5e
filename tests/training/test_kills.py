"""A training that is killed again and again on a plateau loses one epoch at most each time, and ends as the undisturbed one."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import torch
from command import command
from pandas.testing import assert_frame_equal

ROOT = Path(__file__).parents[2]
BATCHES = 12  # of an epoch
NET = """
import os, time
import torch
from torch import nn

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 10))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.long))

    def forward(self, x):
        if self.training:
            self.steps += 1
            with open("progress", "a") as file:
                file.write(f"{os.getpid()} {int(self.steps)}\\n")
            time.sleep(0.01)
        return self.net(x)
"""
# the accuracy rises, so that its minimum is that of the first epoch: a plateau on which the weights move
TRAIN = ("model.net._target_=slow_net.Slow", "dataset.batch_size=100", "dataset.calibration=64", "logger=none", "metrics=[rq]")
TRAIN += ("callbacks=measure", "callbacks.checkpoint.mode=min")


@pytest.fixture
def elsewhere(monkeypatch):
    """A folder for temporary files on another file system."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no other file system for temporary files")
    folder = tempfile.mkdtemp(dir="/dev/shm")
    monkeypatch.setenv("TMPDIR", folder)
    yield folder
    shutil.rmtree(folder)


def start(*words):
    """The process of a training: a fork, because the start of a new one costs seconds."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)  # threads do not survive a fork
        tempfile.tempdir = None  # read TMPDIR again
        ended = command("train", *TRAIN, *words)
        if ended.code:
            Path("error").write_text(ended.err)
        os._exit(ended.code)
    except BaseException as error:
        Path("error").write_text(repr(error))
        os._exit(99)


def trained(*words):
    """Trains to the end."""
    assert os.waitpid(start(*words), 0)[1] == 0, Path("error").read_text()


def progress():
    """(process, step) of every step that was begun."""
    path = Path("progress")
    lines = path.read_text().splitlines() if path.exists() else []
    return [tuple(map(int, line.split())) for line in lines if len(line.split()) == 2]


def wait_for(condition, seconds=60):
    for _ in range(100 * seconds):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError(Path("error").read_text() if Path("error").exists() else "the training does not go on")


def losses():
    """How many steps each restart repeated."""
    return [before + 1 - after for (one, before), (other, after) in pairwise(progress()) if one != other]


def same_results(cut, whole, epochs):
    """Weights, optimizer, score, and the table of each epoch."""
    states = [torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (cut, whole)]
    for name, tensor in states[1]["state_dict"].items():
        assert torch.equal(states[0]["state_dict"][name], tensor), name
    for one, other in zip(*(state["optimizer_states"][0]["state"].values() for state in states), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("exp_avg", "exp_avg_sq"))
    assert (cut / "result.json").read_text() == (whole / "result.json").read_text().replace("/whole/", "/cut/")
    for epoch in range(epochs):
        assert_frame_equal(*(pd.read_parquet(run / f"epochs/units_{epoch:03d}.parquet") for run in (cut, whole)))


def killed(kills, epochs, generator, signals):
    """Trains with that many kills, each after some 1 to 16 steps."""
    words = (f"trainer.max_epochs={epochs}", "hydra.run.dir=cut")
    for _ in range(kills):
        child, aim = start(*words), len(progress()) + generator.randint(1, 2 * BATCHES)
        wait_for(lambda aim=aim: len(progress()) >= aim)
        time.sleep(generator.random() * 0.05)
        os.kill(child, generator.choice(signals))
        os.waitpid(child, 0)
    trained(*words)


@pytest.mark.parametrize(
    ("kills", "epochs"), [(3, 8), pytest.param(20, 45, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])], ids=["3", "20"]
)
def test_kills_at_random_on_a_plateau(kills, epochs, quiet_home, elsewhere):
    (quiet_home / "slow_net.py").write_text(NET)
    generator = random.Random(kills)
    trained(f"trainer.max_epochs={epochs}", "hydra.run.dir=whole")
    Path("progress").unlink()
    killed(kills, epochs, generator, [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
    best = torch.load("cut/checkpoints/best.ckpt", weights_only=True)
    assert best["epoch"] <= epochs // 2, "no plateau"
    assert len(losses()) >= kills - 1
    assert max(losses()) <= BATCHES, losses()
    assert progress()[-1][1] == BATCHES * epochs
    same_results(quiet_home / "cut", quiet_home / "whole", epochs)
    assert not [path for path in Path(elsewhere).rglob("*") if path.is_file()]


@pytest.mark.slow
def test_a_signal_to_one_of_several_processes_stops_all_after_the_same_step(quiet_home):
    (quiet_home / "slow_net.py").write_text(NET)
    words = ("trainer=ddp", "trainer.max_epochs=3")
    trained(*words, "hydra.run.dir=whole")
    Path("progress").unlink()
    parent = start(*words, "hydra.run.dir=cut")
    wait_for(lambda: len(progress()) >= 10)
    os.kill(progress()[-1][0], signal.SIGUSR1)
    assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == 1
    assert "interrupted; the same command with hydra.run.dir=" in Path("error").read_text()
    trained(*words, "hydra.run.dir=cut")
    same_results(quiet_home / "cut", quiet_home / "whole", 3)


def queue(*words):
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def slurm():
    if (
        not shutil.which("sbatch")
        or subprocess.run(["sinfo", "-h"], capture_output=True, text=True, check=False).stdout.strip() == ""
    ):
        pytest.skip("there is no Slurm")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_slurm_requeues(quiet_home, elsewhere, slurm, monkeypatch):
    """SIGUSR1, as before the time limit, makes the job requeue itself; scontrol requeue, as a preemption does, kills it."""
    epochs, generator = 60, random.Random(0)
    (quiet_home / "slow_net.py").write_text(NET)
    trained(f"trainer.max_epochs={epochs}", "hydra.run.dir=whole")
    Path("progress").unlink()
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{quiet_home}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = " ".join(f"'{word}'" for word in (*TRAIN, f"trainer.max_epochs={epochs}", "hydra.run.dir=cut"))
    (quiet_home / "job").write_text(f"#!/bin/bash\nsrun {sys.executable} -m nodelens.app train {words}\n")
    job = queue("sbatch", "--parsable", "--requeue", "--open-mode=append", "-n", "1", "-o", "error", "job")
    for way in ("signal", "requeue", "signal", "signal"):
        aim = len(progress()) + generator.randint(10, 40)
        wait_for(lambda aim=aim: len(progress()) >= aim, 120)
        queue(*(["scancel", "--signal=USR1", job] if way == "signal" else ["scontrol", "requeue", job]))
    wait_for(lambda: (quiet_home / "cut/result.json").exists(), 120)
    wait_for(lambda: queue("squeue", "-h", "-j", job) == "")
    assert len(losses()) == 4
    assert max(losses()) <= BATCHES, losses()
    same_results(quiet_home / "cut", quiet_home / "whole", epochs)
