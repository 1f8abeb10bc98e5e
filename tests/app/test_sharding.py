"""``trainer=fsdp``: one model, sharded over the processes of a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from command import command
from pandas.testing import assert_frame_equal
from torch import nn

import nodelens as nl
from nodelens.app.tasks.sharding import sharded

ROOT = Path(__file__).parents[2]
WORDS = ("model=cnn", "dataset.calibration=100", "logger=none", "dataset.batch_size=32")


def test_a_sharded_model_is_measured_as_the_whole_one(quiet_home):
    for name, trainer in (("one", "trainer=cpu"), ("two", "trainer=fsdp")):
        ended = command("analyze", *WORDS, trainer, f"hydra.run.dir={name}")
        assert ended.code == 0, ended.err
    one, two = nl.load("one"), nl.load("two")
    assert two.metadata["processes"] == 2
    assert two.metadata["model"] == one.metadata["model"]
    assert_frame_equal(two.units, one.units, rtol=1e-5, atol=1e-12, check_exact=False)
    assert_frame_equal(two.layers, one.layers, rtol=1e-5, atol=1e-12, check_exact=False)
    for key in ("accuracy", "loss", "ece", "samples"):
        assert two.metadata["evaluation"][key] == pytest.approx(one.metadata["evaluation"][key], rel=1e-5)


AFTERWARDS = (
    "analysis= needs the whole model in one process: leave it out, or run it afterwards by analyze.py in one process, trainer="
)
COPIES = (
    "initial_path= needs the whole model in one process: leave it out, or run it with a copy of the model per process, trainer=ddp"
)
PRUNE = (
    "prune.py cuts the whole model in one process: choose trainer=cpu or trainer=gpu, or trainer=ddp, which measures scores on a"
)
REFUSED = {
    "prune": ("prune", [], PRUNE),
    "analysis": ("analyze", ["analysis=[clusters]"], AFTERWARDS),
    "initial": ("analyze", ["initial_path=start.pt"], COPIES),
    "epochs": ("train", ["callbacks=measure", "analysis=[modularity]"], AFTERWARDS),
}


@pytest.mark.parametrize(("task", "words", "said"), REFUSED.values(), ids=REFUSED)
def test_what_needs_the_whole_model_is_refused_at_once(quiet_home, task, words, said):
    Path("start.pt").touch()
    ended = command(task, *words, "trainer=fsdp", "hydra.run.dir=run")
    assert ended.code == 1
    assert ended.err.startswith(f"nodelens: trainer=fsdp: {said}"), ended.err
    assert not Path("run").exists()


def test_a_model_that_lies_on_several_gpus_is_refused():
    net = nn.Linear(2, 2)
    net.hf_device_map = {"": 0}
    with pytest.raises(ValueError, match=r"^trainer=fsdp: Linear is quantised, or spread over GPUs already: leave out model.net"):
        sharded(net, torch.device("cpu"))


@pytest.mark.slow
def test_a_sharded_training_is_that_of_copies(tmp_path):
    words = ["trainer.max_epochs=2", "callbacks=measure", "metrics=[rq,taylor,delta_rq]", "model=cnn", "dataset.calibration=64"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for trainer in ("ddp", "fsdp"):
        line = [sys.executable, "-m", "nodelens.app", "train", *words, f"trainer={trainer}", f"hydra.run.dir={trainer}"]
        ended = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280, check=False)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("test accuracy") == 1, ended.stdout
    copies, shards = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("ddp", "fsdp"))
    assert shards["loss"] == pytest.approx(copies["loss"], rel=1e-5)
    one, two = (pd.read_parquet(tmp_path / name / "epochs/units_001.parquet") for name in ("ddp", "fsdp"))
    assert_frame_equal(two, one, rtol=1e-4, atol=1e-9, check_exact=False)
    state = torch.load(tmp_path / "fsdp/checkpoints/best.ckpt", weights_only=True)["state_dict"]
    assert all(type(tensor) is torch.Tensor for tensor in state.values()), "the whole model, for any process"
